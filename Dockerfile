# A server of one bundle, on CPUs:  docker build -t two-tower-rec .
# What it needs at run time: /bundles, a folder with the bundle in it (not the bundle itself: a new one takes its place as a whole
# folder, which a mount of the old one would never see), and /data for accepted events. See docs/serving.md.

FROM python:3.11-slim-bookworm AS build
# PyTorch's builds for CPUs: a tenth of what comes without this. A mirror of your own: --build-arg TORCH_INDEX=…
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/twotower && mkdir /data
ENV PATH=/opt/twotower/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# What goes in the end is of no use to a server: the packages' own tests, and what extensions of PyTorch are compiled with.
RUN pip install --no-cache-dir -c constraints.txt '.[serve,otel]' \
  && python -c 'import torch; assert torch.version.cuda is None, "a CUDA build: see TORCH_INDEX"' \
  && find /opt/twotower/lib -type d \( -name tests -o -path '*/torch/test' -o -path '*/torch/include' \) -prune -exec rm -rf {} +

FROM python:3.11-slim-bookworm
COPY --from=build /opt/twotower /opt/twotower
COPY --from=build --chown=10001:10001 /data /data
ENV PATH=/opt/twotower/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["twotower"]
# Reading needs a key (TWOTOWER_API_KEY, or --api-keys): add --public for a server that everyone may read.
CMD ["serve", "/bundles/bundle", "--host", "0.0.0.0", "--port", "8000", "--events", "sqlite:/data/events.sqlite"]
