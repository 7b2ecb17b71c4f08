# The home event's machine, 8xH100 with an NVIDIA driver of 570 or newer, with the torch of the official image:
#
#   docker build -t golf .
#   mkdir -p data/datasets data/tokenizers runs
#   docker run --gpus all --ipc=host --rm -v "$PWD/data/datasets:/golf/data/datasets" \
#       -v "$PWD/data/tokenizers:/golf/data/tokenizers" -v "$PWD/runs:/golf/runs" golf download --variant sp1024
#   ... the same with `golf seed=42` in the place of `golf download ...` trains, packs, reloads, scores
#
# What follows the image's name are the words of run.sh. `devel`, because torch.compile needs a compiler.
# Written without Docker at hand: tests/test_deployment.py checks what can be checked of it.
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-devel

WORKDIR /golf
COPY requirements*.txt constraints.txt run.sh ./
COPY data/*.py data/
COPY lab lab
COPY golf golf
COPY tools tools
# Each command sets up what it needs, and --help does no more: .venv stands on the image's torch.
RUN bash run.sh download --help >/dev/null && bash run.sh tool report --help >/dev/null
COPY . .
ENTRYPOINT ["bash", "run.sh"]
