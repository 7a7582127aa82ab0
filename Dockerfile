# One image for every process of the service; docker-compose.yml gives each its command.
FROM python:3.12-slim

WORKDIR /srv/cloudmatrix
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY observe observe
COPY fabric fabric
COPY memory_pool memory_pool
COPY engine engine
COPY app app
RUN pip install --no-cache-dir -c constraints.txt .

# The model and the compiled kernels live in a volume, so that a new container starts warm.
ENV CLOUDMATRIX_CACHE_DIR=/var/cache/cloudmatrix
RUN useradd --create-home cloudmatrix && mkdir -p /var/cache/cloudmatrix && chown cloudmatrix /var/cache/cloudmatrix
USER cloudmatrix
VOLUME /var/cache/cloudmatrix
EXPOSE 8000
CMD ["cloudmatrix", "up", "--host", "0.0.0.0", "--no-console"]
