#!/bin/sh
# Compiles the restorer and the library that writes images into the folder $1; needs a C compiler and nothing else.
set -e
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
warnings="-std=gnu11 -O2 -Wall -Wextra -Werror"
# Freestanding, at an address where Linux maps nothing by itself, and without vector registers, which it does not save.
${CC:-cc} $warnings -ffreestanding -fno-stack-protector -fcf-protection=none -fno-pie -fno-asynchronous-unwind-tables \
    -fno-tree-loop-distribute-patterns -mgeneral-regs-only -nostdlib -static -no-pie -Wl,-Ttext-segment=0x200000000000 \
    -Wl,-z,noexecstack,-z,max-page-size=4096,--build-id=none -mcmodel=large -o "$out/restore" restore.c
${CC:-cc} $warnings -fPIC -shared -Wl,-z,noexecstack -o "$out/snap.so" snap.c
