/* The least that answers faults: what the page server is measured against.
 *
 *     bare SOCKET FILE faults   serves FILE page by page until the guest ends
 *     bare SOCKET FILE BYTES    copies all of it in batches of BYTES, and prints how long
 *                               that took in nanoseconds; then as above
 *
 * One region, and nothing is checked. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static void must(int fine, const char *what) {
    if (!fine) {
        perror(what);
        exit(1);
    }
}

static unsigned long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv) {
    must(argc == 4, "arguments");
    int file = open(argv[2], O_RDONLY);
    struct stat st;
    must(file >= 0 && fstat(file, &st) == 0, "file");
    char *content = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    must(content != MAP_FAILED, "mmap");

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    must(bind(listener, (struct sockaddr *)&address, sizeof address) == 0, "bind");
    must(listen(listener, 1) == 0, "listen");
    int guest = accept(listener, NULL, NULL);
    must(guest >= 0, "accept");

    char text[4096] = {0}, control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {text, sizeof text - 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    must(recvmsg(guest, &message, 0) > 0, "recvmsg");
    int uffd;
    memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof uffd);
    char *field = strstr(text, "\"base_host_virt_addr\":");
    must(field != NULL, "address");
    unsigned long long start = strtoull(field + strlen("\"base_host_virt_addr\":"), NULL, 10);

    unsigned long long batch = strtoull(argv[3], NULL, 10);
    if (batch > 0) {
        unsigned long long began = now();
        for (unsigned long long at = 0; at < (unsigned long long)st.st_size; at += batch) {
            struct uffdio_copy copy = {
                .dst = start + at, .src = (unsigned long long)content + at, .len = batch};
            must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "copy");
        }
        printf("%llu\n", now() - began);
        fflush(stdout);
    }
    struct pollfd polled[2] = {{.fd = uffd, .events = POLLIN}, {.fd = guest, .events = POLLIN}};
    for (;;) {
        must(poll(polled, 2, -1) > 0, "poll");
        if (polled[1].revents)
            return 0;
        struct uffd_msg event;
        ssize_t got = read(uffd, &event, sizeof event);
        if (got < 0 && errno == EAGAIN)
            continue;
        must(got == sizeof event && event.event == UFFD_EVENT_PAGEFAULT, "event");
        unsigned long long page = event.arg.pagefault.address & ~4095ull;
        struct uffdio_copy copy = {
            .dst = page, .src = (unsigned long long)content + (page - start), .len = 4096};
        must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "copy");
    }
}
