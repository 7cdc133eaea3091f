#!/bin/sh
# The image that conf/docker/Dockerfile starts from, where no registry can be reached: Debian with its own Python, under the
# name of the real one: sh python.sh python:3.11.13-slim-bookworm. It trusts the authorities that this machine trusts.
set -eu
name=$1
root=$(mktemp --directory)
trap 'rm -rf "$root"' EXIT

debootstrap --variant=minbase bookworm "$root"
cp /etc/resolv.conf "$root/etc/"
env --unset=TMPDIR DEBIAN_FRONTEND=noninteractive chroot "$root" \
    apt-get install --quiet --yes --no-install-recommends python3.11-venv netbase tzdata ca-certificates
chroot "$root" apt-get clean
ln -s /usr/bin/python3.11 "$root/usr/local/bin/python"
ln -s /usr/bin/python3.11 "$root/usr/local/bin/python3"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"

authorities=/etc/ssl/certs/ca-certificates.crt
tar --directory "$root" --create . | docker import \
    --change "ENV PIP_CERT=$authorities SSL_CERT_FILE=$authorities REQUESTS_CA_BUNDLE=$authorities" \
    --change 'LABEL finpro.stand-in=true' --change 'CMD ["python3"]' - "$name"
