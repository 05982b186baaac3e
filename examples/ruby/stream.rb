# Streams a completion over gRPC.
require "scalellm/v1/generation_services_pb"

address = ENV.fetch("SCALELLM_ADDRESS", "127.0.0.1:50051")
key = ENV["SCALELLM_API_KEY"]

stub = Scalellm::V1::Generation::Stub.new(address, :this_channel_is_insecure)
request = Scalellm::V1::GenerateRequest.new(
  prompt: "Once upon a time",
  sampling: Scalellm::V1::SamplingParams.new(max_tokens: 32, temperature: 0)
)
begin
  metadata = key ? { "authorization" => "Bearer #{key}" } : {}
  stub.generate(request, deadline: Time.now + 120, metadata: metadata).each do |response|
    next if response.delta.nil?

    print response.delta.text
    $stdout.flush
  end
  puts
rescue GRPC::BadStatus => e
  abort "#{e.code}: #{e.details}"
end
