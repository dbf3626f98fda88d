#include "ort_values.h"

namespace mpcompile {

OrtStatus* shape_of(Api api, const OrtValue* value, Shape& shape) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatus* failed = ort::GetTensorTypeAndShape::call(api, value, &info)) return failed;
    OrtStatus* failed = ort::GetDimensionsCount::call(api, info, &shape.count);
    if (!failed && shape.count > MOST_DIMENSIONS)
        failed = ort::CreateStatus::call(api, ort::INVALID_ARGUMENT, "mpcompile: a tensor has more than 8 dimensions");
    if (!failed) failed = ort::GetDimensions::call(api, info, shape.sizes, shape.count);
    ort::ReleaseTensorTypeAndShapeInfo::call(api, info);
    return failed;
}

}  // namespace mpcompile
