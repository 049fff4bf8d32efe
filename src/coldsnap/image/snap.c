/* Writes an image of the process that it is loaded into: a library for Python (snap.py), preloaded by the dynamic linker.
 *
 * The process must be one thread with no open file but the standard streams, no memory that others can write, and none
 * that the kernel treats specially. Whatever else it finds it refuses, with a sentence; refusing costs nothing, because
 * then there is no image and workers boot as ever. It runs as the process, so that it needs no right to trace one. */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>
#include "format.h"

#define NEAR 8 /* pages: two runs closer than this are one, because a mapping costs more than eight pages */
#define STACK_ROOM (8ull << 20) /* Linux lets a stack grow down to this by default; in a restored process it is mapped */
#define MOST_TEXT (32u << 20)
#define MOST_NAMES 4096
#define MOST_IN_RUN (512u << 10) /* what a processor's cache holds while it is copied and summed */

/* ── which variables C code has read: preloaded, this getenv is everybody's ── */

static const char *names[MOST_NAMES];
static int name_count, is_noting = 1;
extern char **environ;

static char *find(const char *name) {
  size_t n = strlen(name);
  if (is_noting && name_count < MOST_NAMES) {
    int i = 0;
    while (i < name_count && strcmp(names[i], name)) i++;
    if (i == name_count && (names[i] = strdup(name))) name_count++;
  }
  for (char **e = environ; e && *e; e++) if (!strncmp(*e, name, n) && (*e)[n] == '=') return *e + n + 1;
  return NULL;
}
char *getenv(const char *name) { return find(name); }
char *secure_getenv(const char *name) { return find(name); }
const char *snap_name(int i) { return i < name_count ? names[i] : NULL; }

/* ── writing ── */

/* What is being written lies in memory of its own, which is not part of the image. */
static struct work {
  struct header header;
  struct region regions[MOST_REGIONS];
  struct run runs[MOST_RUNS];
  struct file files[MOST_FILES];
  struct symbol symbols[MOST_SYMBOLS];
  char strings[MOST_STRINGS], text[MOST_TEXT];
  unsigned char changed[1u << 22]; /* a byte for each page of a mapping of up to 16 GiB */
  char copy[MOST_IN_RUN];
} *w;
static struct arrival arrival; /* the restorer writes it, Python reads it */
static struct { struct action actions[65]; stack_t stack; } own; /* what the restorer's guard has replaced meanwhile */
static const int guarded[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP, SIGSYS, SIGALRM};
static char complaint[512];
static int out = -1;
static uint64_t data_end;

const char *snap_complaint(void) { return complaint; }
const struct arrival *snap_arrival(void) { return &arrival; }

static int refuse(const char *format, ...) {
  va_list rest;
  va_start(rest, format);
  if (!complaint[0]) vsnprintf(complaint, sizeof complaint, format, rest); /* the first cause */
  va_end(rest);
  return -1;
}

/* Like setjmp, whose buffer glibc scrambles: return 0 now, and 1 when a restorer jumps to what is saved here. */
int snap_save(struct registers *) __attribute__((returns_twice, visibility("hidden")));
__asm__(".text\n.type snap_save,@function\n.hidden snap_save\n.globl snap_save\nsnap_save:\n"
        "mov %rbx,0(%rdi)\nmov %rbp,8(%rdi)\nmov %r12,16(%rdi)\nmov %r13,24(%rdi)\nmov %r14,32(%rdi)\nmov %r15,40(%rdi)\n"
        "lea 8(%rsp),%rax\nmov %rax,48(%rdi)\nmov (%rsp),%rax\nmov %rax,56(%rdi)\n"
        "stmxcsr 64(%rdi)\nfnstcw 68(%rdi)\nxor %eax,%eax\nret\n.size snap_save,.-snap_save\n");

static int put(const void *bytes, uint64_t size, uint64_t at) {
  for (const char *b = bytes; size;) {
    ssize_t n = pwrite(out, b, size, (off_t)at);
    if (n <= 0) return refuse("the image cannot be written: %s", strerror(errno));
    b += n; size -= (uint64_t)n; at += (uint64_t)n;
  }
  return 0;
}
static int64_t string(const char *s) {
  uint64_t at = w->header.strings_size, n = strlen(s) + 1;
  if (at + n > MOST_STRINGS) return refuse("too many names");
  memcpy(w->strings + at, s, n);
  w->header.strings_size += n;
  return (int64_t)at;
}
static int add_file(const char *path) {
  static int64_t last;
  struct stat st;
  if (last < (int64_t)w->header.files && last >= 0 && !strcmp(w->strings + w->files[last].path, path)) return (int)last;
  for (uint64_t i = 0; i < w->header.files; i++) if (!strcmp(w->strings + w->files[i].path, path)) return (int)(last = (int64_t)i);
  if (w->header.files == MOST_FILES || stat(path, &st)) return refuse("%s: %s", path, strerror(errno));
  int64_t at = string(path);
  if (at < 0) return -1;
  w->files[w->header.files] = (struct file){(uint64_t)at, (uint64_t)st.st_size, (uint64_t)st.st_mtim.tv_sec};
  return (int)(last = (int64_t)w->header.files++);
}
static int add_region(uint64_t start, uint64_t end, uint32_t kind, int prot, uint64_t offset, int file) {
  if (start == end) return 0;
  if (w->header.regions == MOST_REGIONS) return refuse("too many mappings");
  w->regions[w->header.regions++] = (struct region){start, end, offset, kind, (uint32_t)prot, (uint32_t)file, 0};
  return 0;
}
/* Copied first: the stack changes while it is being written. */
static int add_runs(uint64_t start, uint64_t end) {
  for (uint64_t size; start < end; start += size, data_end += size) {
    size = end - start < MOST_IN_RUN ? end - start : MOST_IN_RUN;
    if (w->header.runs == MOST_RUNS) return refuse("too many runs of pages");
    memcpy(w->copy, (void *)start, size);
    w->runs[w->header.runs++] = (struct run){start, size, data_end, sum_of(w->copy, size)};
    if (put(w->copy, size, data_end)) return -1;
  }
  return 0;
}
static int is_zero(const void *page) {
  const uint64_t *word = page;
  for (unsigned i = 0; i < PAGE / 8; i++) if (word[i]) return 0;
  return 1;
}
/* Find the next run of changed pages at or behind `from`; return where it ends, `n` beyond the last. */
static uint64_t next_run(uint64_t n, uint64_t *from) {
  uint64_t i = *from, last;
  while (i < n && !w->changed[i]) i++;
  *from = last = i;
  for (; i < n && i - last <= NEAR; i++) if (w->changed[i]) last = i;
  return *from == n ? n : last + 1;
}

/* Memory of the process alone: the pages that are not all zero. To look is cheaper than to ask /proc/self/pagemap, which
   a container may not have. */
static int anonymous(uint64_t start, uint64_t end, int prot) {
  uint64_t n = (end - start) / PAGE;
  if (add_region(start, end, ANONYMOUS, prot, 0, 0)) return -1;
  if (!(prot & PROT_READ)) return prot ? refuse("memory at %lx can be written and not read", start) : 0;
  if (n > sizeof w->changed) return refuse("a mapping of %lu pages", n);
  for (uint64_t i = 0; i < n; i++) w->changed[i] = !is_zero((void *)(start + i * PAGE));
  for (uint64_t i = 0, j; (j = next_run(n, &i)), i < n; i = j)
    if (add_runs(start + i * PAGE, start + j * PAGE)) return -1;
  return 0;
}
/* A private mapping of a file: what the process has changed is anonymous memory, the rest is mapped from the file. */
static int of_file(uint64_t start, uint64_t end, int prot, uint64_t offset, const char *path, unsigned long inode) {
  uint64_t n = (end - start) / PAGE, plain = 0;
  struct stat st;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || fstat(fd, &st) || st.st_ino != inode) { /* deleted or replaced: it lives on in memory alone */
    if (fd >= 0) close(fd);
    return anonymous(start, end, prot);
  }
  if (n > sizeof w->changed || offset + (end - start) >= (uint64_t)st.st_size + PAGE) {
    close(fd);
    return refuse("%s is mapped beyond its end", path);
  }
  char *same = mmap(NULL, end - start, PROT_READ, MAP_PRIVATE, fd, (off_t)offset);
  close(fd);
  if (same == MAP_FAILED) return refuse("%s: %s", path, strerror(errno));
  for (uint64_t i = 0; i < n; i++) w->changed[i] = memcmp(same + i * PAGE, (void *)(start + i * PAGE), PAGE) != 0;
  munmap(same, end - start);
  int file = add_file(path);
  if (file < 0) return -1;
  for (uint64_t i = 0, j; (j = next_run(n, &i)), i < n; plain = i = j)
    if (add_region(start + plain * PAGE, start + i * PAGE, OF_FILE, prot, offset + plain * PAGE, file) ||
        add_region(start + i * PAGE, start + j * PAGE, ANONYMOUS, prot, 0, 0) ||
        add_runs(start + i * PAGE, start + j * PAGE)) return -1;
  return add_region(start + plain * PAGE, end, OF_FILE, prot, offset + plain * PAGE, file);
}

/* The functions of the vdso. Their first bytes become jumps to those of another kernel, so each needs room for one. */
static int vdso(uint64_t start) {
  const Elf64_Ehdr *elf = (void *)start;
  const Elf64_Phdr *part = (void *)(start + elf->e_phoff);
  const Elf64_Dyn *dynamic = NULL;
  const Elf64_Sym *symbols = NULL;
  const char *strings = NULL;
  for (int i = 0; i < elf->e_phnum; i++) if (part[i].p_type == PT_DYNAMIC) dynamic = (void *)(start + part[i].p_offset);
  for (; dynamic && dynamic->d_tag; dynamic++) {
    if (dynamic->d_tag == DT_SYMTAB) symbols = (void *)(start + dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_STRTAB) strings = (void *)(start + dynamic->d_un.d_ptr);
  }
  if (!symbols || (const char *)symbols >= strings) return refuse("the vdso has no symbols before its strings");
  for (const Elf64_Sym *s = symbols + 1; (const char *)(s + 1) <= strings; s++) {
    if (ELF64_ST_TYPE(s->st_info) != STT_FUNC) continue;
    if (w->header.symbols == MOST_SYMBOLS || s->st_size < 12) return refuse("the vdso has a function of %lu bytes", s->st_size);
    int64_t name = string(strings + s->st_name);
    if (name < 0) return -1;
    w->symbols[w->header.symbols++] = (struct symbol){start + s->st_value, (uint64_t)name};
  }
  return 0;
}

static int mappings(void) {
  int fd = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return refuse("/proc/self/smaps: %s", strerror(errno));
  size_t size = 0;
  for (ssize_t n; (n = read(fd, w->text + size, MOST_TEXT - 1 - size)) > 0;) size += (size_t)n;
  close(fd);
  if (size == MOST_TEXT - 1) return refuse("too many mappings");
  w->text[size] = 0;
  uint64_t start = 0, end = 0, offset = 0, before = 0;
  unsigned long inode = 0;
  char permissions[5] = "", *name = NULL;
  for (char *line = w->text, *next; *line; line = next) {
    next = strchr(line, '\n');
    if (!next) return refuse("/proc/self/smaps ends in the middle of a line");
    *next++ = 0;
    uint64_t s, e, o; unsigned long i; int at = 0; char p[5];
    if (sscanf(line, "%lx-%lx %4s %lx %*x:%*x %lu %n", &s, &e, p, &o, &i, &at) == 5) {
      before = end;
      start = s; end = e; offset = o; inode = i; name = line + at;
      memcpy(permissions, p, sizeof p);
      continue;
    }
    if (strncmp(line, "VmFlags:", 8)) continue; /* the last line of a mapping */
    if (!strcmp(name, "[vsyscall]") || !strncmp(name, "[vvar", 5)) continue; /* the kernel's own */
    if (start == (uint64_t)w) continue;
    if (start < (uint64_t)w + sizeof *w && end > (uint64_t)w) return refuse("the writer's memory was merged with another");
    int is_vdso = !strcmp(name, "[vdso]");
    /* Memory that a fork does not copy, or copies as zeros; that is locked, watched, of huge pages, or a shadow stack. */
    for (char *flag = line + 8; !is_vdso && *flag == ' ' && flag[1]; flag += 3)
      for (const char *odd = "dc wf lo um uw ht ss dp "; *odd; odd += 3)
        if (!strncmp(flag + 1, odd, 2)) return refuse("memory at %lx has the flag %.2s (%s)", start, odd, name);
    int prot = (permissions[0] == 'r') * PROT_READ | (permissions[1] == 'w') * PROT_WRITE | (permissions[2] == 'x') * PROT_EXEC;
    if (permissions[3] == 's' && (prot & PROT_WRITE || *name != '/')) return refuse("memory at %lx is shared (%s)", start, name);
    if (!strcmp(name, "[stack]") && before < start) {
      uint64_t room = start - before > STACK_ROOM ? start - STACK_ROOM : before;
      if (add_region(room, start, ANONYMOUS, PROT_READ | PROT_WRITE, 0, 0)) return -1;
    }
    if (is_vdso && vdso(start)) return -1;
    if (*name == '/' && prot & PROT_READ ? of_file(start, end, prot, offset, name, inode) : anonymous(start, end, prot)) return -1;
  }
  return 0;
}

/* Numbers of /proc/self/stat, proc(5): the kernel's idea of where a process keeps its code, data and arguments. */
static int layout(void) {
  char text[4096];
  int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
  if (fd >= 0) close(fd);
  if (n <= 0) return refuse("/proc/self/stat cannot be read");
  text[n] = 0;
  struct { int field; uint64_t *to; } wanted[] = {
      {26, &w->header.start_code}, {27, &w->header.end_code}, {28, &w->header.start_stack}, {45, &w->header.start_data},
      {46, &w->header.end_data}, {47, &w->header.start_brk}, {48, &w->header.arg_start}, {51, &w->header.arg_end}};
  char *rest, *word = strtok_r(strrchr(text, ')') + 1, " ", &rest);
  for (int field = 3; word; field++, word = strtok_r(NULL, " ", &rest))
    for (unsigned i = 0; i < sizeof wanted / sizeof *wanted; i++)
      if (wanted[i].field == field) *wanted[i].to = strtoull(word, NULL, 10);
  w->header.brk = (uint64_t)sbrk(0);
  return 0;
}

static int entries(const char *folder, int above) {
  DIR *d = opendir(folder);
  int n = 0;
  if (!d) return -1;
  for (struct dirent *e; (e = readdir(d));)
    if (e->d_name[0] != '.' && atoi(e->d_name) > above && atoi(e->d_name) != dirfd(d)) n++;
  closedir(d);
  return n;
}

static int describe(void) {
  struct header *h = &w->header;
  struct itimerval timer;
  int n;
  if ((n = entries("/proc/self/task", 0)) != 1) return refuse("the process has %d threads, not 1", n);
  if ((n = entries("/proc/self/fd", 2)) != 1) return refuse("the process has %d open files beside the standard streams", n - 1);
  if (getitimer(ITIMER_REAL, &timer) || timer.it_value.tv_sec || timer.it_value.tv_usec) return refuse("a timer runs");
  h->magic = IMAGE_MAGIC;
  h->uid = geteuid(); h->gid = getegid();
  read_processor(&h->processor);
  syscall(SYS_arch_prctl, ARCH_GET_FS, &h->fs_base); /* thread-local storage */
  uint64_t gs = 0;
  syscall(SYS_arch_prctl, ARCH_GET_GS, &gs);
  if (gs) return refuse("the GS register is in use");
  /* Where glibc keeps the thread's id, which the next process has to change (and the kernel clears at its end). */
  if (prctl(PR_GET_TID_ADDRESS, &h->tid_address) || !h->tid_address || *(int *)h->tid_address != (int)syscall(SYS_gettid))
    return refuse("the kernel does not say where the thread's id is kept");
  syscall(SYS_get_robust_list, 0, &h->robust_list, &h->robust_size); /* of mutexes that outlive their holder */
  /* glibc's registration for restartable sequences: the kernel writes the processor's number there. */
  ptrdiff_t *offset = dlsym(RTLD_DEFAULT, "__rseq_offset");
  unsigned *size = dlsym(RTLD_DEFAULT, "__rseq_size");
  if (offset && size && *size) { h->rseq = h->fs_base + (uint64_t)*offset; h->rseq_size = *size < 32 ? 32 : *size; }
  for (int s = 1; s <= 64; s++) syscall(SYS_rt_sigaction, s, NULL, &h->actions[s], 8);
  syscall(SYS_rt_sigprocmask, 0, NULL, &h->signal_mask, 8);
  h->arrival = (uint64_t)&arrival;
  return layout();
}

static int write_image(const char *depends) {
  struct header *h = &w->header;
  data_end = PAGE;
  if (string("") < 0 || describe() || mappings()) return -1;
  for (const char *path = depends; *path; path += strlen(path) + 1) if (add_file(path) < 0) return -1;
  struct { const void *bytes; uint64_t size; } tables[] = {
      {w->regions, h->regions * sizeof *w->regions}, {w->runs, h->runs * sizeof *w->runs}, {w->files, h->files * sizeof *w->files},
      {w->symbols, h->symbols * sizeof *w->symbols}, {w->strings, h->strings_size}};
  h->tables_at = h->file_size = data_end;
  for (unsigned i = 0; i < sizeof tables / sizeof *tables; i++) {
    if (put(tables[i].bytes, tables[i].size, h->file_size)) return -1;
    h->file_size += tables[i].size;
  }
  h->tables_size = h->file_size - h->tables_at;
  return put(h, sizeof *h, 0);
}

/* Write an image to the open file `fd`, which is closed then. `depends` are paths that end with a NUL each, and a NUL.
 * Return 0 in this process, 1 in one that was restored, -1 after a refusal. */
int snap_write(int fd, const char *depends) {
  is_noting = 0;
  out = fd;
  complaint[0] = 0;
  w = mmap(NULL, sizeof *w, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (w == MAP_FAILED) { w = NULL; return refuse("no memory for the tables: %s", strerror(errno)); }
  madvise(w, sizeof *w, MADV_DONTDUMP); /* the flag keeps it from being merged with a neighbour */
  for (int s = 1; s <= 64; s++) syscall(SYS_rt_sigaction, s, NULL, &own.actions[s], 8);
  sigaltstack(NULL, &own.stack);
  if (snap_save(&w->header.registers)) {
    w = NULL; out = -1;
    return 1;
  }
  malloc_trim(0); /* what malloc keeps for later becomes zeros, which take no room */
  int result = write_image(depends);
  munmap(w, sizeof *w);
  w = NULL;
  close(out);
  out = -1;
  return result;
}

/* Python runs: from here on a signal is the process's own affair. The window and the strings in it are gone. */
void snap_arrived(void) {
  struct itimerval never = {0};
  setitimer(ITIMER_REAL, &never, NULL);
  for (unsigned i = 0; i < sizeof guarded / sizeof *guarded; i++)
    syscall(SYS_rt_sigaction, guarded[i], &own.actions[guarded[i]], NULL, 8);
  sigaltstack(&own.stack, NULL);
  munmap((void *)WINDOW, WINDOW_END - WINDOW);
}
