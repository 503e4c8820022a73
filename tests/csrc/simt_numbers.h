// fp32 to what a kernel's elements are.
#pragma once

template <class T>
T from_float(float v);
template <>
inline float from_float(float v) { return v; }
template <>
inline __half from_float(float v) { return __float2half(v); }
template <>
inline __nv_bfloat16 from_float(float v) { return __float2bfloat16(v); }
