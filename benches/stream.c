/* Sends or receives bytes as fast as they go, for a guest: prints "rate BYTES-PER-SECOND".
 *
 *     stream send|receive PORT|PATH MIB
 *
 * PORT is one of the host's sockets (vsock(7), CID 2), PATH a device. The clock runs from the first byte until the
 * other side has had or sent the last: who receives says so with a byte. */
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PART 65536

static char part[PART];

static void must(int holds, const char *what)
{
	if (!holds) {
		perror(what);
		exit(1);
	}
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int open_stream(const char *name)
{
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST };
	int fd;

	if (name[0] == '/') {
		fd = open(name, O_RDWR);
		must(fd >= 0, name);
		return fd;
	}
	host.svm_port = strtoul(name, NULL, 10);
	fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	must(fd >= 0, "socket");
	must(connect(fd, (struct sockaddr *)&host, sizeof host) == 0, "connect");
	return fd;
}

int main(int argc, char **argv)
{
	uint64_t left, total;
	double begin;
	int fd, sends;

	must(argc == 4, "usage");
	sends = strcmp(argv[1], "send") == 0;
	fd = open_stream(argv[2]);
	total = left = strtoull(argv[3], NULL, 10) << 20;
	begin = now();
	while (left > 0) {
		size_t most = left < PART ? left : PART;
		ssize_t done = sends ? write(fd, part, most) : read(fd, part, most);
		must(done > 0, argv[1]);
		left -= done;
	}
	if (sends)
		must(read(fd, part, 1) == 1, "the end");
	printf("rate %.0f\n", total / (now() - begin));
	return 0;
}
