# moco-eval for machines with NVIDIA GPUs, with detectron2 built in; docs/install.md shows how to build and run it.
FROM pytorch/pytorch:2.6.0-cuda12.4-cudnn9-devel

# The compiler stays in the image: compiled encoders need it when they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes build-essential git \
    && rm -rf /var/lib/apt/lists/*

# detectron2 is on no package index. Its kernels are compiled here for V100, T4, A100, A10 and RTX 30, L4 and RTX 40, and
# H100; newer GPUs compile them from PTX. The build sees no GPU, hence FORCE_CUDA.
ARG DETECTRON2=02b5c4e295e990042a714712c21dc79b731e8833
ARG CUDA_ARCHITECTURES="7.0;7.5;8.0;8.6;8.9;9.0+PTX"
RUN pip install --no-cache-dir setuptools==75.8.0 wheel==0.45.1 ninja==1.11.1.3 \
    && FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" pip install --no-cache-dir --no-build-isolation \
    "detectron2 @ git+https://github.com/facebookresearch/detectron2@${DETECTRON2}"

WORKDIR /source
COPY . .
RUN pip install --no-cache-dir . \
    && moco-eval --version \
    && python -c "import detectron2._C"

# Give the builder's own number as UID, and the user of the container can write to the builder's folders.
ARG UID=1000
RUN useradd --create-home --no-log-init --uid "${UID}" moco \
    && mkdir --parents /datasets /workspace/runs /workspace/cache \
    && chown --recursive moco /workspace
USER ${UID}
WORKDIR /workspace
ENV XDG_CACHE_HOME=/workspace/cache
VOLUME ["/datasets", "/workspace/runs", "/workspace/cache"]
ENTRYPOINT ["moco-eval"]
CMD ["--help"]
