// Package keylatch answers 503 in keylatch's words: Traefik has no other way to write a body.
package keylatch

import (
	"context"
	"net/http"
)

const body = `{"error":"unavailable","error_description":"The API key could not be checked; try again in a moment"}`

// Config has nothing to say.
type Config struct{}

// CreateConfig is asked for by Traefik.
func CreateConfig() *Config { return &Config{} }

// New is asked for by Traefik.
func New(_ context.Context, _ http.Handler, _ *Config, _ string) (http.Handler, error) {
	return http.HandlerFunc(answer), nil
}

func answer(writer http.ResponseWriter, _ *http.Request) {
	headers := writer.Header()
	headers.Set("Content-Type", "application/json")
	headers.Set("Cache-Control", "no-store")
	headers.Set("X-Keylatch-Error", "unavailable")
	headers.Set("Retry-After", "1")
	writer.WriteHeader(http.StatusServiceUnavailable)
	_, _ = writer.Write([]byte(body))
}
