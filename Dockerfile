# An image of cnn-vis for the CPU. docs/installing.md says how to build and run it.

FROM debian:trixie-slim AS builder
COPY pycaffe/apt-packages.txt pycaffe/system-packages.sh /source/pycaffe/
RUN /source/pycaffe/system-packages.sh && python3 -m venv /opt/cnn-vis
COPY . /source
WORKDIR /source
# GCC's -march. The default is portable: x86-64 processors need AVX2.
ARG PYCAFFE_ARCH
# After the build, Boost's headers (185 MB) and pip are no longer needed.
RUN case $(uname -m) in x86_64) portable=x86-64-v3 ;; *) portable=armv8-a ;; esac \
    && export PYCAFFE_ARCH="${PYCAFFE_ARCH:-$portable}" PYCAFFE_BUNDLE=ON \
    && /opt/cnn-vis/bin/pip install --no-cache-dir -r requirements.txt . \
    && rm -r /opt/cnn-vis/lib/python3*/site-packages/cmeel.prefix/include \
    && /opt/cnn-vis/bin/pip uninstall --yes pip

FROM debian:trixie-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/cnn-vis /opt/cnn-vis
# The container can run as any user, so /networks, and the home in /tmp for libraries' caches, are writable for all.
RUN mkdir --mode=1777 /networks
ENV PATH=/opt/cnn-vis/bin:$PATH CNN_VIS_MODELS=/networks HOME=/tmp
WORKDIR /pictures
USER 1000:1000
ENTRYPOINT ["cnn-vis"]
