/* Marks functions that CUDA kernels share with the CPU. */
#ifndef FA_HOST_DEVICE_H
#define FA_HOST_DEVICE_H

#ifdef __CUDACC__
#define FA_HD __host__ __device__
#else
#define FA_HD
#endif

#endif
