# The server, on processors:
#
#     docker build -t openblip .
#     docker run -p 8000:8000 --shm-size 2g -v openblip-models:/var/lib/openblip openblip --model openblip-mini
#
# What follows the image's name is added to `openblip serve`. Models of the hub are kept in the volume. For NVIDIA GPUs build
# with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126, and run with --gpus all.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/openblip
ENV PATH=/opt/openblip/bin:$PATH
WORKDIR /source
# torch has a layer of its own, and the build that the index has: PyPI's for Linux brings gigabytes of CUDA.
COPY constraints.txt ./
RUN pip install -c constraints.txt --index-url ${TORCH_INDEX} torch
COPY pyproject.toml README.md LICENSE ./
COPY docs ./docs
COPY src ./src
RUN pip install -c constraints.txt ".[search,serve]"

FROM python:${PYTHON}-slim
RUN useradd --system --uid 10001 --home-dir /var/lib/openblip --create-home openblip
COPY --from=build /opt/openblip /opt/openblip
ENV PATH=/opt/openblip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/openblip/huggingface \
    RAY_USAGE_STATS_ENABLED=0
USER openblip
WORKDIR /var/lib/openblip
VOLUME /var/lib/openblip
EXPOSE 8000
# Loading a large model takes minutes, but /health answers before: it says that the process lives, /ready that it serves.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["openblip", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "openblip-mini"]
