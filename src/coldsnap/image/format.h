/* The file format of a process image, shared by the writer (snap.c) and the restorer (restore.c).
 *
 *   header   the first page
 *   data     the pages that no file on the disk has, each run of them page-aligned
 *   tables   regions, runs, files, symbols, strings: back to back, in this order
 *
 * All numbers are little-endian, as x86-64 has them. A string is an offset into the strings, which end with a NUL.
 * The digest covers the rest of the first page and the tables; each run has a sum of its own. So every byte is checked
 * before the process that it belongs to runs. Both find accidents: who may write the file may also run what he likes.
 */
#ifndef COLDSNAP_IMAGE_FORMAT_H
#define COLDSNAP_IMAGE_FORMAT_H
#include <stdint.h>

#define IMAGE_MAGIC 0x3130304d49534f43ull /* "COSIM001" */
#define PAGE 4096ull
#define USER_END 0x7ffffffff000ull /* x86-64 with four levels of page tables; nothing is mapped above unless asked for */

/* The restorer is linked to lie here, and keeps all that it has in between: where Linux puts nothing by itself. */
#define WINDOW 0x200000000000ull
#define WINDOW_END 0x200100000000ull

#define MOST_REGIONS 32768u /* the kernel's own limit, vm.max_map_count, is 65530 */
#define MOST_RUNS 131072u
#define MOST_FILES 32768u
#define MOST_SYMBOLS 64u
#define MOST_STRINGS (16u << 20)

enum region_kind { ANONYMOUS, OF_FILE };

/* A mapping of the process: private memory, or a part of a file that the process has not changed. */
struct region { uint64_t start, end, offset; uint32_t kind, prot, file, unused; };
/* Pages with content, inside one anonymous region. */
struct run { uint64_t start, size, at, sum; };
/* A file that the process depends on, mapped or not: a library, a Python module. Times are in seconds, because the
   layers of a container image keep no more of them. */
struct file { uint64_t path, size, mtime; };
/* A function of the vdso, by its address in the image; the kernel of the restore has it elsewhere. */
struct symbol { uint64_t address, name; };

struct action { uint64_t handler, flags, restorer, mask; }; /* the kernel's struct sigaction */
struct registers { uint64_t rbx, rbp, r12, r13, r14, r15, rsp, rip; uint32_t mxcsr; uint16_t fcw, unused; };
/* What the processor can do, as CPUID and XGETBV say it: libraries chose their code by this when they were loaded. */
struct processor {
  uint32_t leaf1_ecx, leaf1_edx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf71_eax, extended_ecx, extended_edx;
  uint64_t xcr0;
};

struct header {
  uint64_t magic;
  uint8_t digest[32]; /* BLAKE3 of the page behind this field, and of the tables */
  uint64_t file_size, tables_at, tables_size;
  uint64_t regions, runs, files, symbols, strings_size;
  uint32_t uid, gid;
  struct processor processor;
  struct registers registers;
  uint64_t fs_base, tid_address, robust_list, robust_size, rseq, rseq_size, signal_mask;
  uint64_t start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end;
  uint64_t arrival; /* the address of a struct arrival in the process */
  struct action actions[65];
};
_Static_assert(sizeof(struct header) <= PAGE, "the header is one page");

/* What the restorer tells the restored process. The strings lie in the window until `snap_arrived`. */
struct arrival { uint64_t arguments, arguments_size, environment, environment_size, begun_ns, restored_ns; };

#define DIGESTED offsetof(struct header, file_size)

/* The sum of a run: four lanes, so that it keeps up with the copy. `size` is a multiple of a page. */
static inline uint64_t sum_of(const void *start, uint64_t size) {
  const uint64_t *word = start, prime = 0x9e3779b97f4a7c15ull;
  uint64_t a = 1, b = 2, c = 3, d = 4;
  for (uint64_t i = 0; i < size / 8; i += 4) {
    a = (a ^ word[i]) * prime; b = (b ^ word[i + 1]) * prime; c = (c ^ word[i + 2]) * prime; d = (d ^ word[i + 3]) * prime;
    a ^= a >> 29; b ^= b >> 29; c ^= c >> 29; d ^= d >> 29; /* a product alone never moves a high bit down */
  }
  return ((a * prime ^ b) * prime ^ c) * prime ^ d;
}

static inline void cpuid(uint32_t leaf, uint32_t sub, uint32_t out[4]) {
  __asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub));
}
static inline void read_processor(struct processor *p) {
  uint32_t r[4], low, high;
  cpuid(1, 0, r); p->leaf1_ecx = r[2]; p->leaf1_edx = r[3];
  cpuid(7, 0, r); p->leaf7_ebx = r[1]; p->leaf7_ecx = r[2]; p->leaf7_edx = r[3] & 0x03ffffff; /* above: mitigations */
  cpuid(7, 1, r); p->leaf71_eax = r[0];
  cpuid(0x80000001, 0, r); p->extended_ecx = r[2]; p->extended_edx = r[3];
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  p->xcr0 = (uint64_t)high << 32 | low;
}
#endif
