// Parts of passes on a GPU, in one kernel each (cuda_fused.cu).
#pragma once
#include <vector>

#include "caffe/blob.hpp"

namespace caffe {

// The sum of several blobs' gradients, as that of another; false if there are too many.
template <typename Dtype>
bool SumDiffs(const std::vector<Blob<Dtype>*>& from, Blob<Dtype>* to);

// What a ReLU that works in place on a blob does to it, after a bias has been added to its channels, or none if that is null;
// and to its gradient.
template <typename Dtype>
void ReLUForward(const Blob<Dtype>* bias, Blob<Dtype>* blob);
template <typename Dtype>
void ReLUBackward(Blob<Dtype>* blob);

}  // namespace caffe
