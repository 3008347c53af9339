# The environment of the book, for Docker and for Binder:
#   docker build -t batch-norm . && docker run --rm -p 127.0.0.1:8888:8888 batch-norm
FROM python:3.13-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends chromium git make \
    && rm -rf /var/lib/apt/lists/*

# Binder names the user; nobody works as root
ARG NB_USER=reader
ARG NB_UID=1000
RUN useradd --create-home --uid "$NB_UID" "$NB_USER"
ENV HOME=/home/$NB_USER
WORKDIR $HOME/book
RUN chown "$NB_USER:" .
USER $NB_USER

COPY --chown=$NB_UID . .
RUN sh tools/environment.sh && rm -rf "$HOME/.cache"
ENV PATH=$HOME/book/.venv/bin:$PATH

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser"]
