# Everything in one image, set up as a checkout is:
#
#   docker build -t engram-lm .
#   docker run --rm -v "$PWD/runs:/home/engram/engram-lm/runs" engram-lm     # make demo
#   docker run --rm engram-lm make test
#
# With --build-arg PIP_EXTRA_INDEX_URL=… an index that has torch's CPU build makes the image several GB smaller.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium git libibverbs1 libnuma1 libcurl4 make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home engram \
    && install -d -o engram /home/engram/engram-lm

USER engram
WORKDIR /home/engram/engram-lm
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL}

# The environment depends on these files alone, so a change of the sources does not install it again.
COPY --chown=engram Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=engram src/engram_lm/__init__.py src/engram_lm/__init__.py
RUN make venv

COPY --chown=engram . .
CMD ["make", "demo"]
