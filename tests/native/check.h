// One problem against the reference, on one instruction set: values, red zones, inputs, and the same bits for any threads.
#pragma once

#include <atomic>
#include <string>

#include "problem.h"
#include "reference.h"

namespace native {

// What went wrong, or nothing. `worst` becomes the largest error seen, as a fraction of what is allowed.
std::string check_forward(Problem &problem, const Results &expected, int64_t isa, int64_t threads, double &worst);
std::string check_backward(Problem &problem, const Results &expected, int64_t isa, int64_t threads, double &worst);

// Loops that a parallel_for of the driver ran on more than one thread.
extern std::atomic<int64_t> threaded_calls;

// Bad calls of every kind on one instruction set; prints each that is accepted, crashes on none. Returns how many were wrong.
int64_t check_errors(int64_t &tried);

}  // namespace native
