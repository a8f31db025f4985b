"""Tell from the name of a column what it may hold: the words of users, items, times and so on, in several languages."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text, separated by blanks."""
    return frozenset(text.split())


Role = Literal["user", "item", "time", "rating", "event_type", "quantity", "weight", "position", "text", "name"]

_WORDS: dict[str, str] = {
    "user": """user usr u customer cust client buyer shopper member visitor reviewer account person people player subscriber
        listener reader profile household patron consumer guest viewer steam steamid msno username userprofile
        kunde kunden kaufer besucher nutzer benutzer mitglied klant gebruiker bezoeker lid cliente usuario comprador miembro
        utilisateur acheteur membre utente acquirente kund anvandare kunde bruker bruger asiakas kayttaja klient uzytkownik
        zakaznik uzivatel musteri kullanici pelanggan pengguna polzovatel klienta 用户 使用者 客户 顧客 ユーザー 会員 사용자 고객
        пользователь клиент покупатель مستخدم""",
    "user2": "session visit cookie device browser playlist",
    "item": """item product prod sku asin isbn ean upc gtin article movie film track song artist album book video game app venue
        business place poi listing offer course recipe post news photo content aid goods anime show series episode beer wine
        restaurant hotel job property stock merchandise package plu document doc paper clip podcast page event ad thing material
        artikel produkt ware buch lied spiel producto articulo libro pelicula produit livre produto artigo livro prodotto
        articolo libro vara vare bok tuote kirja ksiazka towar zbozi urun barang kitap tovar iid mid pid
        商品 产品 物品 商品コード 상품 제품 товар продукт книга фильм منتج""",
    "time": """time timestamp date datetime ts at when created ordered purchased day datum zeit zeitpunkt zeitstempel tijd tijdstip
        fecha hora heure horodatage data ora tid dato tarih waktu tanggal moment unix utc epoch dat created updated visited
        watched played listened posted rated clicked sold bestellt besteld 日期 时间 時間 日時 날짜 시간 дата время تاريخ""",
    "rating": """rating ratings stars star score rate overall note bewertung punkte sterne grade beoordeling cijfer calificacion
        valoracion puntuacion estrellas avaliacao nota voto valutazione betyg arvosana ocena hodnoceni puan penilaian recommended
        评分 評価 평점 оценка рейтинг تقييم""",
    "event_type": "event action behavior behaviour interaction type kind verb ereignis aktion evento accion evenement azione",
    "quantity": """quantity qty units count amount menge anzahl stuck stueck stuk aantal hoeveelheid cantidad quantite quantidade
        quantita antal maara ilosc mnozstvi adet jumlah plays playcount listens pieces количество 数量 수량""",
    "weight": "weight strength hours playtime duration dwell confidence gewicht peso poids",
    "position": "position rank slot",
    "text": "text comment review body message content summary feedback kommentar rezension commentaire comentario resena",
    "name": """name title titel label headline caption naam bezeichnung titulo nombre nom titre nome titolo namn navn nimi nazwa
        nazev isim judul description 名称 标题 名前 제목 название имя""",
}


def _folded(text: str) -> str:
    """Return a text in lower case without accents and other marks."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.replace("ß", "ss").lower()) if not unicodedata.combining(c))


WORDS: dict[str, frozenset[str]] = {role: word_set(_folded(words)) for role, words in _WORDS.items()}
ID_WORDS = word_set(
    "id ids uid uuid guid key code nr no num number nummer numero numer idx index hash hashed token sk pk fk ref kod cod"
)
FILLERS = word_set("the my our parent anon anonymous encrypted original external internal purchasing unique raw master new")
CODES = word_set("zip zipcode postcode postal postal plz cap isbn ean phone year_code") | ID_WORDS
BEGUN = word_set("""since joined join registered registration signup signed created yelping start begun anmeldung inscription
    registro""")
LATITUDE = word_set("lat latitude breite breitengrad latitud latitudine lt")
LONGITUDE = word_set("lon lng long longitude lange laenge langengrad longitud longitudine")
TYPED = re.compile(r":(token|float|token_seq|float_seq)$")  # of RecBole's atomic files


def words(name: str) -> tuple[str, ...]:
    """Return the words of a column's name: lower case, without accents.

    Examples
    --------
    >>> words("reviewerID"), words("Kunden-Nr."), words("user_id:token")
    (('reviewer', 'id'), ('kunden', 'nr'), ('user', 'id'))
    """
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", TYPED.sub("", name))
    return tuple(word for part in re.split(r"[\W_]+", _folded(parts)) for word in _parted(part) if word)


def _parted(word: str) -> list[str]:
    """Split "visitorid" and "itemno" into a known word and its suffix."""
    for suffix in ("id", "ids", "nr", "no", "nummer", "number", "code", "key", "name"):
        base = word.removesuffix(suffix)
        if (
            base != word
            and len(base) > (2 if base.isascii() else 0)
            and any(base in known or base.rstrip("s") in known for known in WORDS.values())
        ):
            return [base, suffix]
    return [word]


def is_id(name: str, role: str) -> int:
    """Return how clearly a name says "id of a user" (or "item"): 3 with an id word, 2 alone, 1 for a session or a name, 0: not.

    Examples
    --------
    >>> is_id("customer_id", "user"), is_id("klant", "user"), is_id("session", "user"), is_id("customer_city", "user")
    (3, 2, 1, 0)
    """
    found = words(name)
    if found in (("uid",), ("userid",)):
        return 3 if role == "user" else 0
    if found in (("iid",), ("pid",), ("mid",), ("aid",), ("sku",), ("asin",), ("isbn",)):
        return 3 if role == "item" else 0
    marked = any(word in ID_WORDS for word in found)
    rest = [word for word in found if word not in ID_WORDS and word not in FILLERS]
    named = [word for word in rest if word not in ("name", "login")]
    if not named:
        return 0
    if all(_is(word, role) for word in named):
        return 1 if len(named) < len(rest) and role == "user" else 0 if len(named) < len(rest) else 3 if marked else 2
    return 1 if role == "user" and all(_is(word, "user2") or _is(word, "user") for word in named) else 0


def says(name: str, role: str) -> int:
    """Return how clearly a name says this role: 2 if all its words do, 1 if its last or first word does, 0: not.

    Examples
    --------
    >>> says("ordered_at", "time"), says("review_rating", "rating"), says("brand", "rating")
    (2, 1, 0)
    """
    found = words(name)
    if not found:
        return 0
    if all(_is(word, role) for word in found):
        return 2
    return int(_is(found[-1], role) or _is(found[0], role) or (role == "time" and "dat" in found))


def _is(word: str, role: str) -> bool:
    return word in WORDS[role] or (len(word) > 3 and word.endswith("s") and word[:-1] in WORDS[role])
