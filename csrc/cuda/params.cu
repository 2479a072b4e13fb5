__global__ void nothing(float*){}
