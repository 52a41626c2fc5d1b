// How long a computing thread runs before the system looks for another.
#pragma once

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

// Ask the scheduler for its longest time slice. Returns whether it was given.
//
// Where the cores are shared with the server, an event loop or a proxy that wakes for a moment waits for the
// rest of a computing thread's slice (3 ms), unless its own is shorter: then it runs at once (Linux 6.12 and
// later, EEVDF: sched(7), sched_setattr(2), sched_runtime of SCHED_OTHER). Nobody's share of the cores changes,
// as it would with nice(2).
inline bool take_long_slice() {
#if defined(__linux__) && defined(SYS_sched_setattr)
  struct {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime;  // nanoseconds
    uint64_t deadline;
    uint64_t period;
  } attributes{};
  constexpr uint64_t kLongest = 100'000'000;
  constexpr uint64_t kResetOnFork = 1;  // threads and processes that this one starts are not meant
  attributes.size = sizeof(attributes);
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0) return false;
  if (attributes.policy != SCHED_OTHER) return false;
  attributes.flags = kResetOnFork;
  attributes.runtime = kLongest;
  attributes.deadline = attributes.period = 0;
  return syscall(SYS_sched_setattr, 0, &attributes, 0) == 0;
#else
  return false;
#endif
}
