// Caffe calls cblas_sgemm and friends; the OpenBLAS on the package index (scipy-openblas32) exports them as
// scipy_cblas_sgemm and so on, so that it can live in one process with another BLAS. This header, first on the
// include path, gives Caffe the real header under the names it knows.
#pragma once
#include_next <cblas.h>

#define cblas_sgemm scipy_cblas_sgemm
#define cblas_dgemm scipy_cblas_dgemm
#define cblas_sgemv scipy_cblas_sgemv
#define cblas_dgemv scipy_cblas_dgemv
#define cblas_saxpy scipy_cblas_saxpy
#define cblas_daxpy scipy_cblas_daxpy
#define cblas_sscal scipy_cblas_sscal
#define cblas_dscal scipy_cblas_dscal
#define cblas_scopy scipy_cblas_scopy
#define cblas_dcopy scipy_cblas_dcopy
#define cblas_sdot scipy_cblas_sdot
#define cblas_ddot scipy_cblas_ddot
#define cblas_sasum scipy_cblas_sasum
#define cblas_dasum scipy_cblas_dasum
// Caffe defines cblas_saxpby and cblas_daxpby itself.
