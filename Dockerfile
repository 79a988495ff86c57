# vsprefill-server, vsprefill-decode and vsprefill in one image, as a user without rights.
#
#   docker build -t vsprefill .
#   docker run --rm -p 8470:8470 -p 8471:8471 vsprefill            # the default model, on the CPU
#   docker run --rm --gpus all -v DIR:/model:ro -p 8470:8470 vsprefill vsprefill-server --model /model \
#     --listen 0.0.0.0:8470 --metrics_listen 0.0.0.0:8471

FROM debian:12 AS build
WORKDIR /opt/vsprefill
# Packages first: they change seldom, so their layers are kept.
COPY deploy/local deploy/local
COPY client/python client/python
COPY proto proto
RUN deploy/local/setup.sh
COPY . .
RUN deploy/local/setup.sh \
 && VSP_CMAKE_ARGS="-DVSP_TESTS=OFF -DVSP_BENCH=OFF" deploy/local/build.sh vsprefill-server vsprefill-decode vsprefill
# What the programs load: the shared libraries of torch and CUDA, at the path that is linked into them.
RUN packages=$(echo .venv/lib/python3*/site-packages) \
 && mkdir -p /image/opt/vsprefill/build \
 && cp -r --parents build/bin models/SmolLM2-135M-Instruct LICENSE NOTICE /image/opt/vsprefill/ \
 && find "$packages/torch/lib" "$packages"/nvidia -name '*.so*' -exec cp -P --parents {} /image/opt/vsprefill/ \;

FROM debian:12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends libabsl20220623 libcpp-httplib0.11 libgomp1 libgrpc++1.51 libgrpc29 \
      libhwy1 libprometheus-cpp-core1.0 libprotobuf32 libssl3 libxxhash0 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --no-create-home vsprefill
COPY --from=build /image/ /
ENV PATH=/opt/vsprefill/build/bin:$PATH
USER 10001
EXPOSE 8470 8471
STOPSIGNAL SIGTERM
CMD ["vsprefill-server", "--model", "/opt/vsprefill/models/SmolLM2-135M-Instruct", \
     "--listen", "0.0.0.0:8470", "--metrics_listen", "0.0.0.0:8471"]
