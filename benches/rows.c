/* What a machine takes for a few kinds of work: prints "row NAME NANOSECONDS" for each.
 *
 *     rows [NAME]... [MEASUREMENTS]
 *
 * Without names all are done. For a profile of one, a guest's kernel gets "-- NAME 200" at the end of its
 * command line.
 *
 * It runs on the host as it is, and as process 1 of a guest, where it first mounts what it needs and
 * loads the modules in /modules, by name. Times are by CLOCK_MONOTONIC: the best of a few measurements,
 * each of as many turns as take long enough for any clock. */
#define _GNU_SOURCE
#include <dirent.h>
#include <emmintrin.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define LEAST_NS 20000000.0
#define DISK "/dev/vda"

static void must(int holds, const char *what)
{
	if (!holds) {
		perror(what);
		puts("rows: FAILED");
		exit(1);
	}
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static int measurements = 7;
static char **names;

static int wanted(const char *name)
{
	for (char **each = names; *each; each++)
		if (strcmp(*each, name) == 0)
			return 1;
	return *names == NULL;
}

/* `work` does so many turns and returns what they took in ns. */
static void row(const char *name, double (*work)(long turns))
{
	double best = 0;
	long turns = 1;

	if (!wanted(name))
		return;
	while (work(turns) < LEAST_NS)
		turns *= 2;
	for (int n = 0; n < measurements; n++) {
		double each = work(turns) / turns;
		if (n == 0 || each < best)
			best = each;
	}
	printf("row %s %.3f\n", name, best);
	fflush(stdout);
}

/* ---- The processor ---------------------------------------------------------------------------- */

/* Twenty instructions, nine of which use memory; each turn needs the one before it. */
static double memory_loop(long turns)
{
	static uint64_t data[128] = { 1, 2, 3, 4, 5, 6, 7, 8, 9 };
	double begin = now();
	__asm__ volatile(
		"lea -128(%%rsp), %%rsp\n"
		"1: mov (%1), %%rax\n"
		"add 8(%1), %%rax\n"
		"mov %%rax, %%rcx\n"
		"and $0x1f8, %%ecx\n"
		"mov 64(%1,%%rcx), %%rdx\n"
		"xor %%rdx, %%rax\n"
		"push %%rax\n"
		"shr $3, %%rax\n"
		"lea 1(%%rax,%%rdx,2), %%rsi\n"
		"mov %%rsi, 16(%1)\n"
		"addl $1, 24(%1)\n"
		"pop %%rdx\n"
		"add %%rdx, %%rsi\n"
		"movzbl 25(%1), %%ecx\n"
		"sub %%rcx, %%rsi\n"
		"rol $5, %%rsi\n"
		"or $1, %%rsi\n"
		"mov %%rsi, (%1)\n"
		"dec %0\n"
		"jnz 1b\n"
		"lea 128(%%rsp), %%rsp\n"
		: "+r"(turns)
		: "r"(data)
		: "rax", "rcx", "rdx", "rsi", "memory", "cc");
	return now() - begin;
}

static char from[PAGE] __attribute__((aligned(PAGE))), to[PAGE] __attribute__((aligned(PAGE)));

/* As kernels copy pages. */
static double string_copy(long turns)
{
	double begin = now();
	while (turns--) {
		char *source = from, *target = to;
		long len = PAGE;
		__asm__ volatile("rep movsb" : "+S"(source), "+D"(target), "+c"(len) : : "memory");
	}
	return now() - begin;
}

/* As the C library copies for the processor that it finds. */
static double library_copy(long turns)
{
	void *(*volatile copy)(void *, const void *, size_t) = memcpy;
	double begin = now();
	while (turns--)
		copy(to, from, PAGE);
	return now() - begin;
}

/* A multiplication and an addition that need the ones before them. */
static double sse_scalar(long turns)
{
	double begin = now();
	__m128d x = _mm_set_sd(1.0), a = _mm_set_sd(0.999), b = _mm_set_sd(0.001);
	for (long n = 0; n < turns; n++) {
		x = _mm_add_sd(_mm_mul_sd(x, a), b);
		__asm__ volatile("" : "+x"(x));
	}
	return now() - begin;
}

#define ORDER 64
/* Products of matrices: a turn is one multiplication and addition of single numbers. */
static double sse_packed(long turns)
{
	static float a[ORDER][ORDER] __attribute__((aligned(16))), b[ORDER][ORDER] __attribute__((aligned(16))),
		c[ORDER][ORDER] __attribute__((aligned(16)));
	long products = (turns + ORDER * ORDER * ORDER - 1) / (ORDER * ORDER * ORDER);
	double begin = now();
	for (long n = 0; n < products; n++) {
		for (int i = 0; i < ORDER; i++) {
			for (int j = 0; j < ORDER; j += 16) {
				__m128 s0 = _mm_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
				for (int k = 0; k < ORDER; k++) {
					__m128 x = _mm_set1_ps(a[i][k]);
					s0 = _mm_add_ps(s0, _mm_mul_ps(x, _mm_load_ps(&b[k][j])));
					s1 = _mm_add_ps(s1, _mm_mul_ps(x, _mm_load_ps(&b[k][j + 4])));
					s2 = _mm_add_ps(s2, _mm_mul_ps(x, _mm_load_ps(&b[k][j + 8])));
					s3 = _mm_add_ps(s3, _mm_mul_ps(x, _mm_load_ps(&b[k][j + 12])));
				}
				_mm_store_ps(&c[i][j], s0);
				_mm_store_ps(&c[i][j + 4], s1);
				_mm_store_ps(&c[i][j + 8], s2);
				_mm_store_ps(&c[i][j + 12], s3);
			}
		}
		__asm__ volatile("" ::: "memory");
	}
	return (now() - begin) * turns / ((double)products * ORDER * ORDER * ORDER);
}

/* ---- The kernel -------------------------------------------------------------------------------- */

static double system_call(long turns)
{
	double begin = now();
	while (turns--)
		syscall(SYS_getpid);
	return now() - begin;
}

/* A byte to another process and back. */
static double pipe_round_trip(long turns)
{
	int there[2], back[2];
	char byte = 0;
	double time;
	must(pipe(there) == 0 && pipe(back) == 0, "pipe");
	pid_t child = fork();
	must(child >= 0, "fork");
	if (child == 0) {
		close(there[1]);
		close(back[0]);
		while (read(there[0], &byte, 1) == 1 && write(back[1], &byte, 1) == 1)
			;
		_exit(0);
	}
	close(there[0]);
	close(back[1]);
	double begin = now();
	while (turns--)
		must(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "pipe");
	time = now() - begin;
	close(there[1]);
	close(back[0]);
	waitpid(child, NULL, 0);
	return time;
}

/* A process of this small program that ends at once. */
static double fork_exec(long turns)
{
	double begin = now();
	while (turns--) {
		int status = -1;
		pid_t child = fork();
		if (child == 0) {
			execl("/proc/self/exe", "rows", "end", NULL);
			_exit(1);
		}
		must(child > 0 && waitpid(child, &status, 0) == child && status == 0, "fork, exec");
	}
	return now() - begin;
}

/* The first write to a page of anonymous memory. */
static double page_fault(long turns)
{
	enum { PAGES = 4096 };
	double time = 0;
	while (turns > 0) {
		long pages = turns < PAGES ? turns : PAGES;
		volatile char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
					     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		must(memory != MAP_FAILED, "mmap");
		madvise((void *)memory, PAGES * PAGE, MADV_NOHUGEPAGE);
		double begin = now();
		for (long n = 0; n < pages; n++)
			memory[n * PAGE] = 1;
		time += now() - begin;
		munmap((void *)memory, PAGES * PAGE);
		turns -= pages;
	}
	return time;
}

/* ---- The disk ---------------------------------------------------------------------------------- */

static int disk;
static off_t disk_pages;

static double disk_read(long turns)
{
	static char page[PAGE] __attribute__((aligned(PAGE)));
	static uint32_t random = 1;
	double begin = now();
	while (turns--) {
		random = random * 1664525 + 1013904223;
		off_t at = (off_t)((random >> 8) % disk_pages) * PAGE;
		must(pread(disk, page, PAGE, at) == PAGE, DISK);
	}
	return now() - begin;
}

/* ---- Process 1 --------------------------------------------------------------------------------- */

static int not_hidden(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

static void be_init(void)
{
	struct dirent **modules;
	char path[512];

	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	int console = open("/dev/console", O_RDWR);
	if (console >= 0) {
		dup2(console, 0);
		dup2(console, 1);
		dup2(console, 2);
	}
	int count = scandir("/modules", &modules, not_hidden, alphasort);
	for (int n = 0; n < count; n++) {
		snprintf(path, sizeof(path), "/modules/%s", modules[n]->d_name);
		int file = open(path, O_RDONLY | O_CLOEXEC);
		must(file >= 0 && syscall(SYS_finit_module, file, "", 0) == 0, path);
		close(file);
	}
	/* Drivers look for their devices by themselves. */
	for (int n = 0; n < 200 && access(DISK, R_OK) != 0; n++)
		usleep(10000);
	disk = open(DISK, O_RDONLY | O_DIRECT | O_CLOEXEC);
	must(disk >= 0, DISK);
	disk_pages = lseek(disk, 0, SEEK_END) / PAGE;
	must(disk_pages > 0, DISK);
}

int main(int argc, char **argv)
{
	cpu_set_t first;

	if (argc > 1 && strcmp(argv[1], "end") == 0)
		return 0;
	if (argc > 1 && atoi(argv[argc - 1]) > 0) {
		measurements = atoi(argv[argc - 1]);
		argv[argc - 1] = NULL;
	}
	names = argv + 1;
	int init = getpid() == 1;
	if (init)
		be_init();
	/* With two processors, a round trip would be that of their idle states. */
	CPU_ZERO(&first);
	CPU_SET(0, &first);
	must(sched_setaffinity(0, sizeof(first), &first) == 0, "sched_setaffinity");

	row("memory", memory_loop);
	row("movs", string_copy);
	row("memcpy", library_copy);
	row("getpid", system_call);
	row("pipe", pipe_round_trip);
	row("exec", fork_exec);
	row("fault", page_fault);
	row("scalar", sse_scalar);
	row("packed", sse_packed);
	if (init)
		row("disk", disk_read);
	puts("rows: done");
	fflush(stdout);
	if (init)
		reboot(RB_POWER_OFF);
	return 0;
}
