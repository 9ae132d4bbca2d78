/* Consoles: script, function, table, file, pty, socket. */

#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <unistd.h>

/* mov dx, 0x3f8; mov al, 'H'; out dx, al; mov al, 'i'; out dx, al; mov al, 0; out 0xf4, al; hlt */
static const uint8_t CODE[] = {0xba, 0xf8, 3, 0xb0, 'H', 0xee, 0xb0, 'i', 0xee, 0xb0, 0, 0xe6, 0xf4, 0xf4};

static void run(vmcore_console *console) {
    vmcore_vm *vm = NULL;
    vmcore_outcome outcome;
    vmcore_builder *builder = built(CODE, sizeof CODE);
    vmcore_builder_set_exit_port(builder, 0xf4);
    OK(vmcore_builder_add_serial(builder, console));
    OK(vmcore_builder_build(builder, &vm));
    OK(vmcore_vm_run(vm, &outcome));
    CHECK(outcome.kind == VMCORE_OUTCOME_EXIT && outcome.value == 0);
    CHECK(vmcore_vm_press_power_button(vm));
    vmcore_vm_delete(vm);
}

typedef struct sink {
    char text[16];
    size_t len;
    int dropped;
} sink;

static void output(void *user, const uint8_t *data, size_t len) {
    sink *sink = user;
    CHECK(sink->len + len < sizeof sink->text);
    memcpy(sink->text + sink->len, data, len);
    sink->len += len;
}
static ptrdiff_t write_some(void *user, const uint8_t *data, size_t len) {
    output(user, data, len);
    return (ptrdiff_t)len;
}
static ptrdiff_t read_none(void *user, uint8_t *data, size_t len) {
    (void)user, (void)data, (void)len;
    return -EAGAIN;
}
static void dropped(void *user) { ((sink *)user)->dropped++; }

int main(void) {
    vmcore_console *console = NULL;
    vmcore_script *script = NULL;
    vmcore_bytes *text = NULL;
    OK(vmcore_console_script(&script, &console));
    FAILS(VMCORE_ERROR_TIMEOUT, vmcore_script_expect(script, "Hi", 1, NULL));
    run(console);
    OK(vmcore_script_expect(script, "Hi", 1000, &text));
    CHECK(strcmp(vmcore_bytes_text(text), "Hi") == 0);
    vmcore_bytes_delete(text);
    FAILS(VMCORE_ERROR_CLOSED, vmcore_script_send(script, (const uint8_t *)"x", 1));
    OK(vmcore_script_transcript(script, &text));
    CHECK(vmcore_bytes_len(text) == 2);
    vmcore_bytes_delete(text);
    vmcore_script_delete(script);

    sink sink = {0};
    OK(vmcore_console_callback(output, &sink, dropped, &console));
    run(console);
    CHECK(strcmp(sink.text, "Hi") == 0 && sink.dropped == 1);
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_console_callback(NULL, &sink, dropped, &console));
    CHECK(sink.dropped == 2);

    memset(&sink, 0, sizeof sink);
    int pipe_fds[2];
    CHECK(pipe(pipe_fds) == 0);
    vmcore_console_ops ops = {.size = sizeof ops, .write = write_some, .read = read_none, .drop = dropped};
    OK(vmcore_console_custom(&ops, &sink, pipe_fds[0], &console));
    run(console);
    CHECK(strcmp(sink.text, "Hi") == 0 && sink.dropped == 1);
    close(pipe_fds[0]);
    close(pipe_fds[1]);

    char directory[] = "/tmp/vmcore-c-XXXXXX", path[64], line[8] = {0};
    CHECK(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/out", directory);
    OK(vmcore_console_file(path, false, &console));
    run(console);
    FILE *file = fopen(path, "r");
    CHECK(file && fread(line, 1, sizeof line, file) == 2 && strcmp(line, "Hi") == 0);
    fclose(file);
    unlink(path);
    OK(vmcore_console_pty(&text, &console));
    CHECK(strncmp(vmcore_bytes_text(text), "/dev/pts/", 9) == 0);
    vmcore_bytes_delete(text);
    run(console);
    snprintf(path, sizeof path, "%s/socket", directory);
    OK(vmcore_console_socket(path, &console));
    run(console);
    rmdir(directory);

    vmcore_virtio_console *ports = NULL;
    vmcore_vm *vm = NULL;
    OK(vmcore_console_null(&console));
    OK(vmcore_virtio_console_new(console, &ports));
    OK(vmcore_console_null(&console));
    OK(vmcore_virtio_console_add_port(ports, "agent", console));
    vmcore_builder *builder = built(CODE, sizeof CODE);
    OK(vmcore_builder_add_virtio_console(builder, ports));
    OK(vmcore_builder_build(builder, &vm));
    vmcore_vm_delete(vm);
    OK(vmcore_console_null(&console));
    vmcore_console_delete(console);
    vmcore_console_delete(NULL);
    return 0;
}
