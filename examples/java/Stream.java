// Streams a completion over gRPC.
import com.scalellm.v1.GenerateRequest;
import com.scalellm.v1.GenerateResponse;
import com.scalellm.v1.GenerationGrpc;
import com.scalellm.v1.SamplingParams;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import java.util.Iterator;
import java.util.Map;
import java.util.concurrent.TimeUnit;

public final class Stream {
  public static void main(String[] arguments) {
    Map<String, String> environment = System.getenv();
    Metadata metadata = new Metadata();
    String key = environment.getOrDefault("SCALELLM_API_KEY", "");
    if (!key.isEmpty()) {
      metadata.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + key);
    }
    ManagedChannel channel =
        ManagedChannelBuilder.forTarget(environment.getOrDefault("SCALELLM_ADDRESS", "127.0.0.1:50051"))
            .usePlaintext()
            .intercept(MetadataUtils.newAttachHeadersInterceptor(metadata))
            .build();
    GenerateRequest request =
        GenerateRequest.newBuilder()
            .setPrompt("Once upon a time")
            .setSampling(SamplingParams.newBuilder().setMaxTokens(32).setTemperature(0))
            .build();
    try {
      Iterator<GenerateResponse> responses =
          GenerationGrpc.newBlockingStub(channel).withDeadlineAfter(2, TimeUnit.MINUTES).generate(request);
      while (responses.hasNext()) {
        System.out.print(responses.next().getDelta().getText());
        System.out.flush();
      }
      System.out.println();
    } catch (StatusRuntimeException error) {
      System.err.println(error.getStatus().getCode() + ": " + error.getStatus().getDescription());
      System.exit(1);
    } finally {
      channel.shutdownNow();
    }
  }
}
