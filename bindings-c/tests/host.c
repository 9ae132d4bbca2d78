/* Preflight, and the log. */

#include "check.h"

static int messages, dropped;

static void take(void *user, vmcore_log_level level, const char *target, const char *message) {
    CHECK(user == &messages && level >= VMCORE_LOG_ERROR && *target && *message);
    messages++;
}
static void drop(void *user) {
    CHECK(user == &messages);
    dropped++;
}

int main(void) {
    vmcore_report *report = NULL;
    OK(vmcore_host_check(&report));
    bool soft = false;
    for (size_t i = 0; i < vmcore_report_len(report); i++) {
        CHECK(*vmcore_report_reason(report, i) && vmcore_report_advice(report, i));
        soft |= strcmp(vmcore_report_name(report, i), "soft") == 0
            && vmcore_report_status(report, i) == VMCORE_STATUS_USABLE;
    }
    CHECK(soft && strstr(vmcore_report_text(report), "soft: usable"));
    CHECK(vmcore_report_name(report, 99) == NULL && vmcore_report_len(NULL) == 0);
    vmcore_report_delete(report);

    OK(vmcore_log_set(VMCORE_LOG_TRACE, take, &messages, drop));
    FAILS(VMCORE_ERROR_ARGUMENT, vmcore_log_set(99, take, &messages, drop));
    CHECK(dropped == 1);
    OK(vmcore_log_set(VMCORE_LOG_WARN, take, &messages, drop));
    CHECK(dropped == 2);
    OK(vmcore_log_set(VMCORE_LOG_OFF, NULL, NULL, NULL));
    CHECK(dropped == 3);
    return 0;
}
