/* fuzz_check IMAGE ROUNDS: alter the header and the tables of an image at random, sign them again, and have them checked.
 * Run under ASan and UBSan. What the check lets pass is walked as the restorer walks it: every address must be inside. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "check.h"

static uint64_t state = 88172645463325252ull;
static uint64_t any(void) { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state; }

static void sign(struct header *h, const void *tables, uint64_t size) {
  struct blake3 hash;
  blake3_begin(&hash);
  blake3_add(&hash, (uint8_t *)h + DIGESTED, PAGE - DIGESTED);
  blake3_add(&hash, tables, size);
  blake3_end(&hash, h->digest);
}
int main(int argc, char **argv) {
  if (argc != 3) return 64;
  FILE *file = fopen(argv[1], "rb");
  static uint8_t first[PAGE];
  if (!file || fread(first, PAGE, 1, file) != 1) return 65;
  struct header *whole = (struct header *)first;
  uint8_t *tables = malloc(whole->tables_size);
  fseek(file, (long)whole->tables_at, SEEK_SET);
  if (fread(tables, whole->tables_size, 1, file) != 1) return 65;
  if (wrong_header(whole, whole->file_size) || wrong_tables(whole, tables)) return 66;
  long passed = 0, rounds = atol(argv[2]);
  for (long round = 0; round < rounds; round++) {
    _Alignas(8) uint8_t page[PAGE];
    memcpy(page, first, PAGE);
    uint8_t *altered = malloc(whole->tables_size); /* exactly so large, that a step beyond is seen */
    memcpy(altered, tables, whole->tables_size);
    for (int n = 1 + (int)(any() % 4); n; n--) {
      uint64_t where = any(), value = any() % 3 ? any() : (any() % 3 ? 0 : ~0ull);
      unsigned width = 1u << any() % 4;
      if (where % 3 == 0) memcpy(page + 8 + any() % 96, &value, width); /* sizes and places */
      else memcpy(altered + any() % (whole->tables_size - 8), &value, width);
    }
    struct header *h = (struct header *)page;
    if (!wrong_header(h, whole->file_size) && h->tables_size == whole->tables_size) {
      sign(h, altered, h->tables_size);
      if (!wrong_tables(h, altered)) {
        struct tables t = tables_in(h, altered);
        passed++;
        for (uint64_t i = 0, run = 0; i < h->regions; i++) {
          const struct region *r = &t.regions[i];
          if (r->start < WINDOW_END && r->end > WINDOW) abort();
          if (r->kind == OF_FILE && strlen(t.strings + t.files[r->file].path) >= h->strings_size) abort();
          for (; run < h->runs && t.runs[run].start < r->end; run++)
            if (t.runs[run].start < r->start || t.runs[run].start + t.runs[run].size > r->end ||
                t.runs[run].at + t.runs[run].size > h->tables_at) abort();
        }
        for (uint64_t i = 0; i < h->symbols; i++) if (strlen(t.strings + t.symbols[i].name) >= h->strings_size) abort();
      }
    }
    free(altered);
  }
  printf("%ld of %ld passed\n", passed, rounds);
  free(tables);
  fclose(file);
  return 0;
}
