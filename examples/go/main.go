// Streams a completion over gRPC.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "scalellm/v1"
)

func main() {
	log.SetFlags(0)
	address := os.Getenv("SCALELLM_ADDRESS")
	if address == "" {
		address = "127.0.0.1:50051"
	}
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute) // the deadline holds on every hop
	defer cancel()                                                          // cancels the request if it still runs
	if key := os.Getenv("SCALELLM_API_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	maxTokens, temperature := uint32(32), float32(0)
	stream, err := pb.NewGenerationClient(connection).Generate(ctx, &pb.GenerateRequest{
		Input:    &pb.GenerateRequest_Prompt{Prompt: "Once upon a time"},
		Sampling: &pb.SamplingParams{MaxTokens: &maxTokens, Temperature: &temperature},
	})
	for err == nil {
		var response *pb.GenerateResponse
		if response, err = stream.Recv(); err == nil {
			fmt.Print(response.GetDelta().GetText())
		}
	}
	if err != io.EOF {
		log.Fatalf("%s: %s", status.Code(err), status.Convert(err).Message())
	}
	fmt.Println()
}
