/* BLAKE3, plain hashing only, 32 bytes out, written after its paper: blake3.pdf, sections 2.1 to 2.6. */
#ifndef COLDSNAP_IMAGE_BLAKE3_H
#define COLDSNAP_IMAGE_BLAKE3_H
#include <stdint.h>

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT_NODE = 8 };

static const uint32_t blake3_iv[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

/* Bytes come in pieces; the values of finished subtrees wait on `stack`, one for each bit of `chunks`. */
struct blake3 {
  uint32_t value[8], stack[54][8];
  uint8_t block[64];
  uint64_t chunks;
  uint32_t in_block, blocks;
};

#define TURN(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define MIX(a, b, c, d, x, y) \
  s[a] += s[b] + (x); s[d] = TURN(s[d] ^ s[a], 16); s[c] += s[d]; s[b] = TURN(s[b] ^ s[c], 12); \
  s[a] += s[b] + (y); s[d] = TURN(s[d] ^ s[a], 8); s[c] += s[d]; s[b] = TURN(s[b] ^ s[c], 7)

static void blake3_compress(uint32_t out[8], const uint32_t value[8], const uint32_t words[16], uint64_t counter,
                            uint32_t size, uint32_t flags) {
  static const uint8_t order[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};
  uint32_t m[16], next[16], s[16];
  for (int i = 0; i < 16; i++) m[i] = words[i];
  for (int i = 0; i < 8; i++) s[i] = value[i];
  for (int i = 0; i < 4; i++) s[8 + i] = blake3_iv[i];
  s[12] = (uint32_t)counter; s[13] = (uint32_t)(counter >> 32); s[14] = size; s[15] = flags;
  for (int round = 0; round < 7; round++) {
    MIX(0, 4, 8, 12, m[0], m[1]); MIX(1, 5, 9, 13, m[2], m[3]);
    MIX(2, 6, 10, 14, m[4], m[5]); MIX(3, 7, 11, 15, m[6], m[7]);
    MIX(0, 5, 10, 15, m[8], m[9]); MIX(1, 6, 11, 12, m[10], m[11]);
    MIX(2, 7, 8, 13, m[12], m[13]); MIX(3, 4, 9, 14, m[14], m[15]);
    for (int i = 0; i < 16; i++) next[i] = m[order[i]];
    for (int i = 0; i < 16; i++) m[i] = next[i];
  }
  for (int i = 0; i < 8; i++) out[i] = s[i] ^ s[i + 8];
}
static void blake3_block(struct blake3 *h, uint32_t flags) {
  uint32_t words[16];
  for (int i = 0; i < 16; i++)
    words[i] = (uint32_t)h->block[4 * i] | (uint32_t)h->block[4 * i + 1] << 8 | (uint32_t)h->block[4 * i + 2] << 16 |
               (uint32_t)h->block[4 * i + 3] << 24;
  blake3_compress(h->value, h->value, words, h->chunks, h->in_block, flags | (h->blocks == 0 ? CHUNK_START : 0));
  h->blocks++; h->in_block = 0;
  for (int i = 0; i < 64; i++) h->block[i] = 0;
}
static void blake3_parent(uint32_t out[8], const uint32_t left[8], const uint32_t right[8], uint32_t flags) {
  uint32_t words[16];
  for (int i = 0; i < 8; i++) { words[i] = left[i]; words[8 + i] = right[i]; }
  blake3_compress(out, blake3_iv, words, 0, 64, PARENT | flags);
}
static void blake3_chunk(struct blake3 *h) {
  for (int i = 0; i < 8; i++) h->value[i] = blake3_iv[i];
  for (int i = 0; i < 64; i++) h->block[i] = 0;
  h->in_block = h->blocks = 0;
}
static int blake3_waiting(uint64_t chunks) {
  int n = 0;
  for (; chunks; chunks &= chunks - 1) n++;
  return n;
}

static void blake3_begin(struct blake3 *h) { h->chunks = 0; blake3_chunk(h); }
static void blake3_add(struct blake3 *h, const void *bytes, uint64_t size) {
  for (const uint8_t *b = bytes; size; b++, size--) {
    if (h->in_block == 64) { /* more follows, so this block is not its chunk's last unless it is the sixteenth */
      if (h->blocks < 15) blake3_block(h, 0);
      else {
        blake3_block(h, CHUNK_END);
        int top = blake3_waiting(h->chunks++);
        for (uint64_t rest = h->chunks; !(rest & 1); rest >>= 1) blake3_parent(h->value, h->stack[--top], h->value, 0);
        for (int i = 0; i < 8; i++) h->stack[top][i] = h->value[i];
        blake3_chunk(h);
      }
    }
    h->block[h->in_block++] = *b;
  }
}
static void blake3_end(struct blake3 *h, uint8_t out[32]) {
  int top = blake3_waiting(h->chunks);
  blake3_block(h, CHUNK_END | (top ? 0 : ROOT_NODE));
  while (top--) blake3_parent(h->value, h->stack[top], h->value, top ? 0 : ROOT_NODE);
  for (int i = 0; i < 32; i++) out[i] = (uint8_t)(h->value[i / 4] >> 8 * (i % 4));
}
#endif
