// Which parts of the interface a set of problems held.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "problem.h"

namespace native {

// What a set of problems held, to be printed: a part that never came up was never tested.
struct Coverage {
  std::vector<std::pair<std::string, int64_t>> parts;
  void count(const std::string &part, bool present);
};

void count_parts(const Problem &problem, Coverage &coverage);

}  // namespace native
