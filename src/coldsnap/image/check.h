/* Whether an image is one that the writer could have written: nothing in it may lead the restorer astray.
 *
 * Pure: it reads the two blocks that it is given and nothing else, so that tests/unit/image can run it under a fuzzer. */
#ifndef COLDSNAP_IMAGE_CHECK_H
#define COLDSNAP_IMAGE_CHECK_H
#include <stddef.h>
#include "blake3.h"
#include "format.h"

struct tables {
  const struct region *regions; const struct run *runs; const struct file *files; const struct symbol *symbols;
  const char *strings;
};

static inline struct tables tables_in(const struct header *h, const void *bytes) {
  struct tables t;
  t.regions = bytes;
  t.runs = (const struct run *)(t.regions + h->regions);
  t.files = (const struct file *)(t.runs + h->runs);
  t.symbols = (const struct symbol *)(t.files + h->files);
  t.strings = (const char *)(t.symbols + h->symbols);
  return t;
}

/* Return what is wrong with a header, given the size of its file; NULL if nothing is. */
static const char *wrong_header(const struct header *h, uint64_t size) {
  if (size < PAGE || h->magic != IMAGE_MAGIC) return "it is no process image of this version";
  if (h->file_size != size) return "it is cut short, or longer than it was";
  if (h->regions > MOST_REGIONS || h->runs > MOST_RUNS || h->files > MOST_FILES || h->symbols > MOST_SYMBOLS ||
      h->strings_size > MOST_STRINGS)
    return "a table is larger than any that was written";
  uint64_t needed = h->regions * sizeof(struct region) + h->runs * sizeof(struct run) + h->files * sizeof(struct file) +
                    h->symbols * sizeof(struct symbol) + h->strings_size;
  if (h->tables_size != needed || h->tables_at % PAGE || h->tables_at < PAGE || h->tables_at > size ||
      needed != size - h->tables_at)
    return "its tables are not where they should be";
  return NULL;
}

/* Return what is wrong with the tables, once the header is right; NULL if nothing is. */
static const char *wrong_tables(const struct header *h, const void *bytes) {
  struct blake3 hash;
  uint8_t digest[32];
  blake3_begin(&hash);
  blake3_add(&hash, (const uint8_t *)h + DIGESTED, PAGE - DIGESTED);
  blake3_add(&hash, bytes, h->tables_size);
  blake3_end(&hash, digest);
  for (int i = 0; i < 32; i++) if (digest[i] != h->digest[i]) return "its BLAKE3 digest is another";

  struct tables t = tables_in(h, bytes);
  if (!h->strings_size || t.strings[h->strings_size - 1]) return "its strings do not end";
  for (uint64_t i = 0; i < h->files; i++) if (t.files[i].path >= h->strings_size) return "a file has no path";
  for (uint64_t i = 0; i < h->symbols; i++) if (t.symbols[i].name >= h->strings_size) return "a symbol has no name";
  uint64_t end = PAGE, run = 0, placed = 0;
  for (uint64_t i = 0; i < h->regions; i++) {
    const struct region *r = &t.regions[i];
    if (r->start % PAGE || r->end % PAGE || r->start < end || r->end <= r->start || r->end > USER_END)
      return "a region is out of order";
    if (r->start < WINDOW_END && r->end > WINDOW) return "a region is where the restorer lies";
    if (r->prot & ~7u) return "a region has no such protection";
    if (r->kind == OF_FILE ? r->file >= h->files || r->offset % PAGE : r->kind != ANONYMOUS) return "a region has no content";
    for (; run < h->runs && t.runs[run].start < r->end; run++) {
      const struct run *u = &t.runs[run];
      if (r->kind != ANONYMOUS || u->start % PAGE || u->size % PAGE || !u->size || u->start < r->start ||
          u->size > r->end - u->start || (run && u->start < t.runs[run - 1].start + t.runs[run - 1].size))
        return "a run is outside its region";
      if (u->at % PAGE || u->at < PAGE || u->at > h->tables_at || u->size > h->tables_at - u->at) return "a run is outside the data";
    }
    end = r->end;
    for (uint64_t j = 0; r->kind == ANONYMOUS && j < h->symbols; j++) /* room for a jump: see restore.c */
      if (t.symbols[j].address >= r->start && t.symbols[j].address < r->end && r->end - t.symbols[j].address >= 12) placed++;
  }
  if (placed != h->symbols) return "a symbol is outside all regions";
  return run == h->runs ? NULL : "a run is outside all regions";
}
#endif
