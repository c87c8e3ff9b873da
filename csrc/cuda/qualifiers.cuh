// The words that nvcc knows and a plain C++ compiler does not.
#pragma once

#ifdef __CUDACC__

#define PYEFF_KERNEL __global__
#define PYEFF_DEVICE __device__ __forceinline__
#define PYEFF_BOTH __host__ __device__ __forceinline__
#define PYEFF_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define PYEFF_GRID_CONSTANT __grid_constant__
#define PYEFF_UNROLL _Pragma("unroll")
#define PYEFF_NO_UNROLL _Pragma("unroll 1")

#else

#define PYEFF_KERNEL
#define PYEFF_DEVICE inline
#define PYEFF_BOTH inline
#define PYEFF_LAUNCH_BOUNDS(threads, blocks)
#define PYEFF_GRID_CONSTANT
#define PYEFF_UNROLL
#define PYEFF_NO_UNROLL

#endif
