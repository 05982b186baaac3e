// Streams a completion over gRPC.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <string>

#include "scalellm/v1/generation.grpc.pb.h"

int main() {
  const char* address = std::getenv("SCALELLM_ADDRESS");
  const char* key = std::getenv("SCALELLM_API_KEY");
  const auto channel = grpc::CreateChannel(address != nullptr ? address : "127.0.0.1:50051",
                                           grpc::InsecureChannelCredentials());
  const auto stub = scalellm::v1::Generation::NewStub(channel);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(2));
  if (key != nullptr) context.AddMetadata("authorization", std::string("Bearer ") + key);
  scalellm::v1::GenerateRequest request;
  request.set_prompt("Once upon a time");
  request.mutable_sampling()->set_max_tokens(32);
  request.mutable_sampling()->set_temperature(0);

  const auto reader = stub->Generate(&context, request);
  scalellm::v1::GenerateResponse response;
  while (reader->Read(&response)) std::cout << response.delta().text() << std::flush;
  const grpc::Status status = reader->Finish();
  if (!status.ok()) {
    std::cerr << status.error_code() << ": " << status.error_message() << '\n';
    return 1;
  }
  std::cout << '\n';
}
