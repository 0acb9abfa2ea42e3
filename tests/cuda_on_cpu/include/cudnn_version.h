// cuDNN 9, for build files that look for this header.
#pragma once
#define CUDNN_MAJOR 9
