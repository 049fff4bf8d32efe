/* restore auto|require IMAGE COMMAND [ARGUMENT...]: become the process in IMAGE, as if COMMAND had been run.
 *
 * On any refusal COMMAND is run instead, with the reason in COLDSNAP_IMAGE_REFUSED; with `require` that is the end. It
 * needs no privilege: it unmaps itself but for a window in which the image has nothing, maps what the image says, fills
 * and checks it, and jumps. COMMAND and its strings lie in the window, so the way back is open until the process that
 * was restored says that it runs (`snap_arrived`): also a signal that kills, or ten seconds, lead to COMMAND.
 *
 * Freestanding, because no library may lie where the image's do: the kernel is called directly. */
#include <asm/prctl.h>
#include <asm/signal.h>
#include <asm/stat.h>
#include <asm/unistd.h>
#include <elf.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/prctl.h>
#include <linux/stat.h>
#include "check.h"

typedef uint64_t u64;
#define HEADER_AT (WINDOW + 0x10000000)
#define TABLES_AT (WINDOW + 0x20000000)
#define STRINGS_AT (WINDOW + 0x40000000)
#define PATIENCE_SECONDS 10 /* for Python to speak; it takes a hundredth of a second from a fast disk */
#define TRIES 4 /* the kernel puts the vdso somewhere else each time; the image is in its way once in hundreds */

static long call(long n, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f) {
  long r;
  register u64 r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
  __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return r;
}
#define CALL6(n, a, b, c, d, e, f, ...) call(__NR_##n, (u64)(a), (u64)(b), (u64)(c), (u64)(d), (u64)(e), (u64)(f))
#define CALL(...) CALL6(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

/* The compiler calls these for copies of structures. */
void *memcpy(void *to, const void *from, u64 n) { void *r = to; __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory"); return r; }
void *memset(void *to, int c, u64 n) { void *r = to; __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(c) : "memory"); return r; }
static u64 length(const char *s) { u64 n = 0; while (s[n]) n++; return n; }
static int same(const char *a, const char *b) { while (*a && *a == *b) a++, b++; return *a == *b; }
static int begins(const char *s, const char *with) { while (*with) if (*s++ != *with++) return 0; return 1; }
static u64 now(void) { struct { u64 s, ns; } t; CALL(clock_gettime, 1 /* CLOCK_MONOTONIC */, &t); return t.s * 1000000000 + t.ns; }

/* ── the way back ── */

static const char refused[] = "COLDSNAP_IMAGE_REFUSED=", tried[] = "COLDSNAP_IMAGE_TRIES=";
static char reason[1024] = "COLDSNAP_IMAGE_REFUSED=";
static char **command, **variables; /* `variables` has room for one more */
static u64 variable_count, original_mask, is_required, is_started;
static struct action original[65];

static void add(const char *s) {
  u64 n = length(reason), more = length(s);
  if (n + more < sizeof reason) memcpy(reason + n, s, more + 1);
}
static void add_number(u64 v) {
  char digits[21] = "", *d = digits + 20;
  do *--d = (char)('0' + v % 10); while (v /= 10);
  add(d);
}
/* Run COMMAND. What a process keeps over execve(2) is put back first: the signal mask, ignored signals, a timer. */
static void __attribute__((noreturn)) plain(void) {
  const char *why = reason + sizeof refused - 1;
  u64 never[4] = {0};
  if (is_required || !same(why, "there is none")) {
    const char *parts[] = {"coldsnap: process image: ", why, is_required ? "" : "; booting plainly", "\n"};
    for (int i = 0; i < 4; i++) CALL(write, 2, parts[i], length(parts[i]));
  }
  if (is_required) CALL(exit_group, 75 /* EX_TEMPFAIL */);
  CALL(setitimer, 0, never, 0);
  if (is_started) for (u64 s = 1; s <= 64; s++) CALL(rt_sigaction, s, &original[s], 0, 8);
  CALL(rt_sigprocmask, 2 /* SIG_SETMASK */, &original_mask, 0, 8);
  variables[variable_count] = reason;
  variables[variable_count + 1] = 0;
  long r = CALL(execve, command[0], command, variables);
  reason[sizeof refused - 1] = 0;
  add(command[0]); add(": cannot be run, error "); add_number((u64)-r); add("\n");
  CALL(write, 2, reason + sizeof refused - 1, length(reason + sizeof refused - 1));
  CALL(exit_group, 127);
  __builtin_unreachable();
}
static void __attribute__((noreturn)) refuse(const char *why, const char *what) {
  if (what) { add(what); add(": "); }
  add(why);
  plain();
}
static long need(long result, const char *what) { /* `result` of a call of the kernel that must succeed */
  if (result >= 0 || result < -4095) return result;
  add(what); add(": error "); add_number((u64)-result);
  plain();
}
static void died(int signal) {
  reason[sizeof refused - 1] = 0;
  if (signal == SIGALRM) add("it had not begun to run Python after 10 s");
  else { add("signal "); add_number((u64)signal); add(" before it ran Python"); }
  plain();
}
static void returned(void) { __builtin_trap(); } /* the kernel wants a way back from a handler; `died` never takes it */

static char stack[1 << 16] __attribute__((aligned(64))), guard_stack[1 << 16] __attribute__((aligned(64)));
static const int guarded[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP, SIGSYS, SIGALRM};

static int is_guarded(int signal) {
  for (unsigned i = 0; i < sizeof guarded / sizeof *guarded; i++) if (guarded[i] == signal) return 1;
  return 0;
}
static void guard(void) {
  struct { void *start; int flags; u64 size; } on = {guard_stack, 0, sizeof guard_stack};
  struct action action = {(u64)died, SA_ONSTACK | SA_NODEFER | 0x04000000 /* SA_RESTORER */, (u64)returned, 0};
  u64 patience[4] = {0, 0, PATIENCE_SECONDS, 0};
  CALL(sigaltstack, &on, 0);
  for (unsigned i = 0; i < sizeof guarded / sizeof *guarded; i++) CALL(rt_sigaction, guarded[i], &action, 0, 8);
  CALL(setitimer, 0 /* ITIMER_REAL */, patience, 0);
}

/* ── the vdso: the kernel's own code in each process, which stays where it is ── */

static u64 kernels_start, kernels_end, vdso_start; /* [vvar…] and [vdso], one behind the other */

static void find_vdso(void) {
  static char text[1 << 15];
  u64 size = 0;
  long n, fd = need(CALL(open, "/proc/self/maps", O_RDONLY), "/proc/self/maps");
  while ((n = CALL(read, fd, text + size, sizeof text - 1 - size)) > 0) size += (u64)n;
  CALL(close, fd);
  for (const char *p = text; *p; p++) {
    u64 edge[2] = {0, 0};
    for (int i = 0; i < 2; i++, p++)
      for (; *p != '-' && *p != ' '; p++) edge[i] = edge[i] * 16 + (u64)(*p <= '9' ? *p - '0' : *p - 'a' + 10);
    while (*p != '\n' && *p != '[') p++;
    if (begins(p, "[vvar") || begins(p, "[vdso]")) {
      if (!kernels_start) kernels_start = edge[0];
      else if (edge[0] != kernels_end) refuse("the kernel's pages do not lie together", 0);
      kernels_end = edge[1];
      if (begins(p, "[vdso]")) vdso_start = edge[0];
    }
    while (*p != '\n') p++;
  }
  if (!vdso_start) refuse("this kernel maps no vdso", 0);
}
static u64 vdso_symbol(const char *name) {
  const Elf64_Ehdr *elf = (void *)vdso_start;
  const Elf64_Phdr *part = (void *)(vdso_start + elf->e_phoff);
  const Elf64_Dyn *dynamic = 0;
  const Elf64_Sym *symbol = 0;
  const char *strings = 0;
  for (int i = 0; i < elf->e_phnum; i++) if (part[i].p_type == PT_DYNAMIC) dynamic = (void *)(vdso_start + part[i].p_offset);
  for (; dynamic && dynamic->d_tag; dynamic++) {
    if (dynamic->d_tag == DT_SYMTAB) symbol = (void *)(vdso_start + dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_STRTAB) strings = (void *)(vdso_start + dynamic->d_un.d_ptr);
  }
  for (; symbol && (const char *)(symbol + 1) <= strings; symbol++)
    if (symbol->st_value && same(strings + symbol->st_name, name)) return vdso_start + symbol->st_value;
  return 0;
}

/* ── the image, checked before anything is given up ── */

static const struct header *header;
static struct tables tables;
static long image;
static struct arrival arrival;

static void open_image(const char *path) {
  struct stat st;
  image = CALL(open, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (image == -2 /* ENOENT */) refuse("there is none", 0);
  need(image, path);
  need(CALL(fstat, image, &st), path);
  /* Who may write an image may run what he likes as whoever restores it. */
  u64 uid = (u64)CALL(geteuid), gid = (u64)CALL(getegid);
  if (!S_ISREG(st.st_mode) || (st.st_uid != uid && st.st_uid != 0) || st.st_mode & 022)
    refuse("it is not a file that this user alone may write", path);
  if ((u64)st.st_size < PAGE) refuse("it is cut short", path);
  header = (void *)need(CALL(mmap, HEADER_AT, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, image, 0), path);
  const char *wrong = wrong_header(header, (u64)st.st_size);
  if (wrong) refuse(wrong, path);
  /* Read, not mapped: a file that is cut short meanwhile must not be a signal. */
  u64 room = (header->tables_size + PAGE) & ~(PAGE - 1);
  char *to = (void *)need(CALL(mmap, TABLES_AT, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), path);
  for (u64 n = 0; n < header->tables_size;) {
    long r = need(CALL(pread64, image, to + n, header->tables_size - n, header->tables_at + n), path);
    if (!r) refuse("it is cut short", path);
    n += (u64)r;
  }
  if ((wrong = wrong_tables(header, to))) refuse(wrong, path);
  tables = tables_in(header, to);
  if (header->uid != uid || header->gid != gid) refuse("it is another user's process", path);
}
static int lacks(uint32_t image_has, uint32_t here) { return (image_has & ~here) != 0; }

static void check_machine(void) {
  const struct processor *p = &header->processor;
  struct processor here;
  read_processor(&here);
  if (lacks(p->leaf1_ecx, here.leaf1_ecx) || lacks(p->leaf1_edx, here.leaf1_edx) || lacks(p->leaf7_ebx, here.leaf7_ebx) ||
      lacks(p->leaf7_ecx, here.leaf7_ecx) || lacks(p->leaf7_edx, here.leaf7_edx) || lacks(p->leaf71_eax, here.leaf71_eax) ||
      lacks(p->extended_ecx, here.extended_ecx) || lacks(p->extended_edx, here.extended_edx) || p->xcr0 & ~here.xcr0)
    refuse("this processor lacks a feature of the one that it was made on", 0);
  for (u64 i = 0; i < header->symbols; i++)
    if (!vdso_symbol(tables.strings + tables.symbols[i].name)) refuse("this kernel's vdso lacks it", tables.strings + tables.symbols[i].name);
  for (u64 i = 0; i < header->files; i++) {
    const struct file *f = &tables.files[i];
    struct stat st;
    if (CALL(stat, tables.strings + f->path, &st) < 0) refuse("it is gone since the image was made", tables.strings + f->path);
    if ((u64)st.st_size != f->size || (u64)st.st_mtime != f->mtime) refuse("it has changed since the image was made", tables.strings + f->path);
  }
}
static u64 in_the_way(void) {
  for (u64 i = 0; i < header->regions; i++)
    if (tables.regions[i].start < kernels_end && tables.regions[i].end > kernels_start) return 1;
  return 0;
}

/* ── the process ── */

/* Memory is filled by copying, not mapped from the image: what the process frees with MADV_DONTNEED must come back as
 * zeros, and the file may then be replaced. */
static void map_memory(void) {
  long fd = -1;
  u64 run = 0;
  uint32_t open_file = 0;
  need(CALL(munmap, 0, WINDOW), "munmap");
  need(CALL(munmap, WINDOW_END, kernels_start - WINDOW_END), "munmap");
  if (kernels_end < USER_END) need(CALL(munmap, kernels_end, USER_END - kernels_end), "munmap");
  for (u64 i = 0; i < header->regions; i++) {
    const struct region *r = &tables.regions[i];
    u64 size = r->end - r->start, flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    if (r->kind == OF_FILE) {
      const char *path = tables.strings + tables.files[r->file].path;
      if (fd < 0 || open_file != r->file) {
        if (fd >= 0) CALL(close, fd);
        fd = need(CALL(open, path, O_RDONLY | O_CLOEXEC), path);
        open_file = r->file;
      }
      need(CALL(mmap, r->start, size, r->prot, flags, fd, r->offset), path);
      continue;
    }
    int has_runs = run < header->runs && tables.runs[run].start < r->end;
    need(CALL(mmap, r->start, size, has_runs ? PROT_READ | PROT_WRITE : r->prot, flags | MAP_ANONYMOUS, -1, 0), "memory");
    for (; run < header->runs && tables.runs[run].start < r->end; run++) {
      const struct run *u = &tables.runs[run];
      for (u64 n = 0; n < u->size;) {
        long got = need(CALL(pread64, image, u->start + n, u->size - n, u->at + n), "the image");
        if (!got) refuse("the image was cut short meanwhile", 0);
        n += (u64)got;
      }
      if (sum_of((void *)u->start, u->size) != u->sum) refuse("the image's pages are not those that were written", 0);
    }
  }
  if (fd >= 0) CALL(close, fd);
  CALL(close, image);
}
/* The image's vdso is data, and each of its functions a jump to this kernel's: mov $function,%rax; jmp *%rax. */
static void lead_to_the_kernel(void) {
  for (u64 i = 0; i < header->symbols; i++) {
    unsigned char *from = (void *)tables.symbols[i].address;
    u64 to = vdso_symbol(tables.strings + tables.symbols[i].name);
    from[0] = 0x48; from[1] = 0xb8; memcpy(from + 2, &to, 8); from[10] = 0xff; from[11] = 0xe0;
  }
}
static void protect_memory(void) {
  for (u64 i = 0; i < header->regions; i++) {
    const struct region *r = &tables.regions[i];
    if (r->kind == ANONYMOUS && r->prot != (PROT_READ | PROT_WRITE))
      need(CALL(mprotect, r->start, r->end - r->start, r->prot), "mprotect");
  }
}
/* What the kernel knows of a process beside its memory. */
static void tell_the_kernel(void) {
  const struct header *h = header;
  /* What ps shows: the new arguments, where setproctitle(3) will look for the old ones. */
  u64 room = h->arg_end - h->arg_start, size = arrival.arguments_size < room ? arrival.arguments_size : room;
  memcpy((void *)h->arg_start, (void *)arrival.arguments, size);
  struct prctl_mm_map map = {
      .start_code = h->start_code, .end_code = h->end_code, .start_data = h->start_data, .end_data = h->end_data,
      .start_brk = h->start_brk, .brk = h->brk, .start_stack = h->start_stack, .arg_start = h->arg_start,
      .arg_end = h->arg_start + size, .env_start = h->arg_end, .env_end = h->arg_end, .exe_fd = (uint32_t)-1};
  CALL(prctl, PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0); /* without it malloc maps its memory, and ps shows less */
  CALL(prctl, PR_SET_NAME, "python", 0, 0, 0);
  for (u64 s = 1; s <= 64; s++) {
    if (is_guarded((int)s)) continue;
    /* A handler is the process's own, and so are these two, which Python ignores; the rest a program inherits. */
    int is_own = h->actions[s].handler > 1 || s == SIGPIPE || s == SIGXFSZ;
    CALL(rt_sigaction, s, is_own ? &h->actions[s] : &original[s], 0, 8);
  }
  CALL(arch_prctl, ARCH_SET_FS, h->fs_base);
  *(int *)h->tid_address = (int)CALL(set_tid_address, h->tid_address);
  if (h->robust_list) need(CALL(set_robust_list, h->robust_list, h->robust_size), "set_robust_list");
  if (h->rseq) need(CALL(rseq, h->rseq, h->rseq_size, 0, 0x53053053 /* glibc's signature */), "rseq");
  arrival.restored_ns = now();
  memcpy((void *)h->arrival, &arrival, sizeof arrival);
  CALL(rt_sigprocmask, 2 /* SIG_SETMASK */, &h->signal_mask, 0, 8);
}
static void __attribute__((noreturn, used)) become(void) {
  guard();
  map_memory();
  lead_to_the_kernel();
  protect_memory();
  tell_the_kernel();
  __asm__ volatile("ldmxcsr 64(%0)\nfldcw 68(%0)\nmov 0(%0),%%rbx\nmov 8(%0),%%rbp\nmov 16(%0),%%r12\nmov 24(%0),%%r13\n"
                   "mov 32(%0),%%r14\nmov 40(%0),%%r15\nmov 48(%0),%%rsp\nmov $1,%%eax\njmp *56(%0)" ::"D"(&header->registers) : "memory");
  __builtin_unreachable();
}

/* ── the beginning ── */

/* Copy `from` and its strings to the window; `*at` is the first byte that is free there. */
static char **keep(char **from, u64 count, char **at) {
  char **to = (char **)(((u64)*at + 15) & ~15ull), *s = (char *)(to + count + 3);
  for (u64 i = 0; i < count; i++) {
    u64 n = length(from[i]) + 1;
    memcpy(s, from[i], n);
    to[i] = s;
    s += n;
  }
  to[count] = 0;
  *at = s;
  return to;
}
static void __attribute__((noreturn, used)) begin(u64 *sp) {
  u64 count = sp[0], size = 0, environment_count = 0, tries = 0;
  char **arguments = (char **)(sp + 1), **environment = arguments + count + 1;
  arrival.begun_ns = now();
  if (count < 4 || !(same(arguments[1], "auto") || same(arguments[1], "require"))) {
    static const char usage[] = "usage: restore auto|require IMAGE COMMAND [ARGUMENT...]\n";
    CALL(write, 2, usage, sizeof usage - 1);
    CALL(exit_group, 64 /* EX_USAGE */);
  }
  for (u64 i = 3; i < count; i++) size += length(arguments[i]) + 9;
  for (char **e = environment; *e; e++, environment_count++) {
    size += length(*e) + 9;
    if (begins(*e, tried)) tries = length(*e) - (sizeof tried - 1);
  }
  command = arguments + 3; /* until it is copied */
  variables = (char **)__builtin_alloca((environment_count + 2) * sizeof *variables);
  for (u64 i = 0; i < environment_count; i++)
    if (!begins(environment[i], refused) && !begins(environment[i], tried)) variables[variable_count++] = environment[i];
  CALL(rt_sigprocmask, 0, 0, &original_mask, 8);
  for (u64 s = 1; s <= 64; s++) CALL(rt_sigaction, s, 0, &original[s], 8);
  is_started = 1;
  is_required = same(arguments[1], "require");

  char *at = (void *)need(CALL(mmap, STRINGS_AT, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), "memory");
  command = keep(arguments + 3, count - 3, &at);
  arrival.arguments = (u64)command[0]; arrival.arguments_size = (u64)(at - command[0]);
  variables = keep(variables, variable_count, &at);
  arrival.environment = (u64)(variables + variable_count + 3); arrival.environment_size = (u64)at - arrival.environment;

  open_image(arguments[2]);
  find_vdso();
  check_machine();
  if (in_the_way()) {
    static char more[sizeof tried + TRIES] = "COLDSNAP_IMAGE_TRIES=";
    if (tries >= TRIES) refuse("the kernel puts its vdso where the image lies", 0);
    for (u64 i = 0; i <= tries; i++) more[sizeof tried - 1 + i] = '+';
    variables[variable_count] = more;
    variables[variable_count + 1] = 0;
    CALL(execve, "/proc/self/exe", arguments, variables);
    refuse("the kernel puts its vdso where the image lies", 0);
  }
  u64 all = ~0ull;
  CALL(rt_sigprocmask, 2 /* SIG_SETMASK */, &all, 0, 8); /* a SIGTERM waits until Python is there to take it */
  __asm__ volatile("mov %0,%%rsp\nxor %%ebp,%%ebp\ncall become" ::"r"(stack + sizeof stack - 64) : "memory");
  __builtin_unreachable();
}
__asm__(".text\n.globl _start\n_start:\nxor %ebp,%ebp\nmov %rsp,%rdi\nand $-16,%rsp\ncall begin\nhlt\n");
