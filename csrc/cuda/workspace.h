// Memory in which the blocks of one launch leave each other numbers and flags. All bytes are `fill`
// while no kernel runs: a kernel waits for something else, and leaves `fill` behind.
//
// One for each fill, device, stream and graph capture, kept for good (64 to some 200 KB): launches
// that share one never overlap, whatever stream a graph is replayed on. Made at the first call and
// when a call needs more, for which the host waits; a capture is not disturbed and records nothing.
#pragma once

#include "cuda/launch.h"

#ifdef FUSEDPEFT_SIMT
namespace fusedpeft::cuda {
unsigned* workspace(std::size_t words, cudaStream_t stream, unsigned char fill);  // the test's own
}
#else
#include <map>
#include <mutex>
#include <tuple>

namespace fusedpeft::cuda {

inline unsigned* workspace(std::size_t words, cudaStream_t stream, unsigned char fill) {
  const auto checked = [](cudaError_t error) { check_launch("workspace", error); };
  struct Held {
    unsigned* data = nullptr;
    std::size_t words = 0;
  };
  static std::mutex mutex;
  static auto& all = *new std::map<std::tuple<int, int, cudaStream_t, unsigned long long>, Held>;
  int device = 0;
  checked(cudaGetDevice(&device));
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  checked(cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  Held& held = all[{fill, device, stream, capture}];
  if (held.words >= words) return held.data;
  std::size_t size = 1 << 14;
  while (size < words) size *= 2;
  struct Relaxed {  // allows what follows while this or another thread captures
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  } relaxed;
  unsigned* data = nullptr;
  cudaStream_t own = nullptr;
  checked(cudaMalloc(&data, size * sizeof *data));
  checked(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
  checked(cudaMemsetAsync(data, fill, size * sizeof *data, own));
  checked(cudaStreamSynchronize(own));
  checked(cudaStreamDestroy(own));
  held = {data, size};  // a smaller one stays where graphs and running kernels have its address
  return data;
}

}  // namespace fusedpeft::cuda
#endif
