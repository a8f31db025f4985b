"""Open bundles, refresh their items, remove users from them: make the versions that are served."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from twotower.bundle.bundle import load_bundle
from twotower.bundle.forgetting import forget_users
from twotower.bundle.publish import RemoteIndex, publish_again
from twotower.errors import BusyError, DataError, TwoTowerError
from twotower.schema import DAY_S, FIRST_ROW, UNKNOWN
from twotower.serving.catalogue import Browser
from twotower.serving.event_journal import Journal
from twotower.serving.event_types import digest_of
from twotower.serving.freshness import Freshness, RefreshError, Version, failed
from twotower.serving.item_changes import with_changes
from twotower.serving.kept_versions import KeptVersions, kept_beside
from twotower.serving.model_version import Engine
from twotower.serving.prometheus import Meters
from twotower.utils.config_serving import Loop
from twotower.utils.console import log
from twotower.utils.types import Json

LATEST = 1000  # events of a store that tell which bundle it belongs to
MIN_SHARED_FRAC = 0.5


@dataclass(frozen=True, slots=True)
class Trial:
    """A second bundle beside the first.

    Attributes
    ----------
    bundle
        Its folder; None: there is none.
    share
        Share of the users whose lists it makes; None: it computes all lists, and users do not see them.
    """

    bundle: Path | None = None
    share: float | None = None


class Updater:
    """Holds the served versions and makes new ones.

    Parameters
    ----------
    bundle
        Folder of the first bundle.
    trusted_key
        Public key that bundles must be signed for, those of reloads included; see `load_bundle`.
    refresh_s
        Interval in seconds at which the items are refreshed; 0: only on demand.
    trial
        A second bundle.
    config
        What is kept.
    index
        Where bundles are searched; None: in this process. It holds one version, so there is no trial then.

    Raises
    ------
    TwoTowerError
        A bundle cannot be opened, or the bundles or the event store do not fit together.
    """

    def __init__(
        self,
        bundle: Path,
        journal: Journal,
        meters: Meters,
        trusted_key: Path | None,
        refresh_s: float,
        trial: Trial,
        config: Loop,
        index: RemoteIndex | None = None,
    ) -> None:
        self.journal, self.meters, self.refresh_s = journal, meters, refresh_s
        self._trusted_key, self._index = trusted_key, index
        self._config, self._purged, self._paths = config, frozenset[str](), set[Path]()
        self.kept = KeptVersions(kept_beside(bundle), config.keep_versions)
        current = self._version(bundle, Engine.load(bundle, trusted_key, index))
        if not current.items_changed:  # else its latest events may be of items that were added, and reset
            check_store(journal, current.engine)
        if trial.bundle is not None:
            other = self._version(trial.bundle, Engine.load(trial.bundle, trusted_key))
            check_catalogues(current, other)
            current = self._beside(current, other, trial.share)
        self.serve(current)

    @staticmethod
    def _beside(current: Version, other: Version, share: float | None) -> Version:
        if share is None:
            return replace(current, shadow=other)
        return replace(current, rival=other, rival_share=share)

    def serve(self, version: Version) -> None:
        """Serve a version from now on."""
        self.current = version
        for one in versions_of(version):
            self._paths.add(one.path)
            self.kept.add(one.path, one.engine.version)
        self.meters.bundle(*(one.engine.version for one in versions_of(version)))
        self.meters.items(version.engine.as_of, version.items_changed, asdict(version.freshness.counts))

    def opened(self, path: Path | None) -> Version:
        """Return the version of the bundle at `path`; None: the current folder, which is read again.

        Raises
        ------
        DataError
            The bundle cannot answer. The log says why.
        """
        before = self.current.path
        try:
            version = self._rewritten(self._opened(path or before), self.journal.forgotten, {})
            self._purged = frozenset()  # what was written meanwhile may hold a forgotten user, kept versions included
            for other in versions_of(self.current)[1:]:
                check_catalogues(version, other)
        except TwoTowerError as error:
            self.meters.reload("refused")
            log.error("reload refused; %s stays in use: %s", before, error)
            raise
        current = self.current
        return replace(version, rival=current.rival, rival_share=current.rival_share, shadow=current.shadow)

    def reloaded(self, version: Version) -> Json:
        """Serve an opened version. Return its name and that of the previous one."""
        before = self.current.engine.version
        self.serve(version)
        self.meters.reload("loaded")
        log.info("now serving %s, version %s", version.path, version.engine.version)
        return {"version": version.engine.version, "previous_version": before}

    def promoted(self) -> Version:
        """Return the second version as the only one.

        Raises
        ------
        DataError
            There is no second version.
        """
        other = self.current.rival or self.current.shadow
        if other is None:
            raise DataError("There is no second version to promote. Start the server with two bundles, or with --shadow.")
        return other

    def rolled_back(self) -> Version:
        """Return the version that was served before, alone; with a second version, the first one alone.

        Raises
        ------
        DataError
            None is kept, or it cannot answer.
        """
        if self.current.rival is not None or self.current.shadow is not None:
            return replace(self.current, rival=None, rival_share=0.0, shadow=None)
        return self._opened(self.kept.before(self.current.engine.version))

    def left(self, version: str) -> None:
        """Note that the server has gone back from a version."""
        if version != self.current.engine.version:
            self.kept.drop(version)

    def refreshed(self) -> Version:
        """Return the current version with all accepted events and changes of items, or itself if there are no new ones.

        Users who were forgotten meanwhile are removed from the bundles.

        Raises
        ------
        RefreshError
            It failed. The last items stay in use.
        """
        current = self._with_changed_items(self._without_forgotten())
        fresh = current.freshness.refresh(current)
        rival, shadow = (None if one is None else one.freshness.refresh(one) for one in (fresh.rival, fresh.shadow))
        return fresh if rival is fresh.rival and shadow is fresh.shadow else replace(fresh, rival=rival, shadow=shadow)

    def holds(self, user: str) -> bool:
        """Return whether a served bundle holds a user."""
        return any(user in one.engine.dataset.user_ids[FIRST_ROW:] for one in versions_of(self.current))

    def expire(self) -> None:
        """Delete events and answers that are older than the settings allow. A failure is logged."""
        now, config = time.time(), self._config
        events = None if config.keep_events_days is None else int(now - DAY_S * config.keep_events_days)
        with suppress(BusyError):
            self.journal.expire(events, int(now - DAY_S * config.keep_answers_days))

    def _without_forgotten(self) -> Version:
        """Return the current version, whose bundles were rewritten if they hold a user who was forgotten."""
        gone = self.journal.forgotten - self._purged
        if not gone:
            return self.current
        served, moved = versions_of(self.current), dict[Path, Path]()
        for path in self.kept.paths():
            if path.name in {one.engine.version for one in served} and path not in {one.path for one in served}:
                self.kept.drop(path.name)  # it is kept again when its rewritten bundle is served
                continue
            with suppress(TwoTowerError, OSError):
                manifest = forget_users(path, lambda user: digest_of(user) in gone)
                if manifest is not None:
                    moved[path] = self.kept.renamed(path, manifest.seal[:12])
        current = self._rewritten(self.current, gone, moved)
        rival, shadow = (None if one is None else self._rewritten(one, gone, moved) for one in (current.rival, current.shadow))
        current = replace(current, rival=rival, shadow=shadow)
        for path in self._paths - {one.path for one in versions_of(current)} - set(self.kept.paths()):
            self._purge(path, gone)  # served earlier
        self._purged |= gone
        return current

    def _purge(self, path: Path, gone: frozenset[str]) -> None:
        """Remove forgotten users from a folder that is not served any more; one that was deleted is passed over."""
        if self._trusted_key is not None:
            log.error("%s may hold a forgotten user. Run `twotower forget`, and sign the bundle", path)
            return
        with suppress(TwoTowerError, OSError):
            forget_users(path, lambda user: digest_of(user) in gone)

    def _rewritten(self, version: Version, gone: frozenset[str], moved: dict[Path, Path]) -> Version:
        if not any(digest_of(str(user)) in gone for user in version.engine.dataset.user_ids[FIRST_ROW:]):
            return version
        if self._trusted_key is not None:
            log.error("%s holds a forgotten user. Run `twotower forget`, sign the bundle, and reload it", version.path)
            return version
        path = moved.get(version.path, version.path)
        forget_users(path, lambda user: digest_of(user) in gone)  # another server of the same folder may have done it
        if self._index is not None:
            try:
                publish_again(load_bundle(path), self._index.address)
            except DataError as error:
                raise BusyError(f"The user is removed from {path}, but its vectors are not published. {error}") from None
        fresh = self._opened(path)
        return replace(fresh, rival=version.rival, rival_share=version.rival_share, shadow=version.shadow)

    def _opened(self, path: Path) -> Version:
        try:
            engine = Engine.load(path, self._trusted_key, self._index)
        except TwoTowerError:
            raise
        except Exception:  # valid hashes but invalid content
            log.exception("%s cannot be served", path)
            raise DataError(
                f"The bundle {path} fails on a test request; the log has the traceback. Write it again with `twotower export`."
            ) from None
        freeze_garbage_collector()
        return self._version(path, engine)

    def _with_changed_items(self, version: Version) -> Version:
        """Return the version with all changes of items, or itself if there are no new ones."""
        try:
            if all(self.journal.item_changes(one.items_changed) is None for one in versions_of(version)):
                return version
            first, rival, shadow = (
                one and self._version(one.path, one.loaded or one.engine) for one in (version, version.rival, version.shadow)
            )
        except BusyError as error:
            raise failed(version, error, self.meters, 0.0) from None
        assert first is not None
        return replace(first, rival=rival, rival_share=version.rival_share, shadow=shadow)

    def _version(self, path: Path, loaded: Engine) -> Version:
        """Return the version of a loaded bundle, with the changes of items, and the accepted events unless `refresh_s` is 0."""
        made = with_changes(loaded, self.journal, remote=self._index is not None)
        freshness = Freshness(made.engine, self.journal, self.meters)
        browser = Browser(made.engine, self.journal)
        version = Version(path, made.engine, browser, freshness, loaded=loaded, items_changed=made.times)
        if self.refresh_s:
            with suppress(RefreshError):  # logged
                return freshness.refresh(version)
        return version


def versions_of(version: Version) -> list[Version]:
    """Return the version, and the one beside it."""
    return [one for one in (version, version.rival, version.shadow) if one is not None]


def check_store(journal: Journal, engine: Engine) -> None:
    """Check that an event store is about the items of a bundle.

    Raises
    ------
    DataError
        The bundle knows no item of the latest events.
    """
    items = {str(event.item_id) for _, event in journal.log()[-LATEST:]}
    if items and not any(engine.row(item) != UNKNOWN for item in items):
        known = str(engine.dataset.item_ids[FIRST_ROW]) if engine.dataset.n_items else ""
        raise DataError(
            f"The event store belongs to another bundle: {engine.name} knows none of its {len(items):,} latest items. "
            f"The store has {min(items)[:80]!r}, the bundle has {known[:80]!r}. Choose its store with --events."
        )


def check_catalogues(first: Version, second: Version) -> None:
    """Check that two versions differ, and are about the same items.

    Raises
    ------
    DataError
        They are the same version, or share less than half of the items of the smaller catalogue.
    """
    if first.engine.version == second.engine.version:
        raise DataError(
            f"{first.path} and {second.path} are the same version, {first.engine.version}. Two versions at once must differ. "
            "Choose another bundle for one of them."
        )
    small, large = sorted((first.engine, second.engine), key=lambda engine: engine.dataset.n_items)
    smaller = small.dataset.item_ids[FIRST_ROW:]
    shared = sum(large.row(str(item)) != UNKNOWN for item in smaller)
    if shared < MIN_SHARED_FRAC * len(smaller):
        raise DataError(
            f"{first.path} and {second.path} have different catalogues: they share {shared:,} of {len(smaller):,} items. "
            "Two versions need at least half. Choose bundles of the same catalogue."
        )


def freeze_garbage_collector() -> None:
    """Exclude all loaded objects from garbage collection, which would delay responses by tens of milliseconds."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
