# The GPU path: NVIDIA's PyTorch image has torch, transformer-engine and apex built for each other. Not run yet.
#   docker build --build-arg IMAGE=(NVIDIA's PyTorch image, 25.09 or later) -t tidar-megatron .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" tidar-megatron make test-gpu
ARG IMAGE
FROM ${IMAGE}
WORKDIR /workspace
COPY . .
# the image's torch and transformer-engine stay: the constraints name CPU builds
RUN pip install --no-cache-dir -e '.[quickstart,dev]'
