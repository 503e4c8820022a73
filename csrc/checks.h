// Checks of arguments that came from outside: "name: expected ..., got ...", raised in Python as
// ValueError before anything is read or launched.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace fusedpeft {

// Throws std::invalid_argument with the parts joined, unless `ok`.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A row-major matrix [rows, cols] with `stride` elements between rows, at an address from Python.
inline void check_matrix(const char* name, std::uintptr_t address, std::int64_t rows,
                         std::int64_t cols, std::int64_t stride) {
  check(rows >= 0 && cols >= 0, name, ": expected sizes >= 0, got [", rows, ", ", cols, "]");
  // Neighbouring rows may be one (an expanded tensor), but never run backwards.
  check(stride >= 0, name, ": expected a row stride >= 0, got ", stride);
  check(address != 0 || rows == 0 || cols == 0, name, ": expected an address, got null for [", rows,
        ", ", cols, "]");
}

}  // namespace fusedpeft
