// A documentation assistant in the terminal, with the standard library only: reads a folder of Markdown, then answers
// questions about it. The texts are one cache object of Kimi's caching API.
//
//	keepwarm serve --dev             # in another terminal
//	go run . ../../docs
//
// The cache is an optimisation and never an error: without a ready object, or when it vanished, the texts themselves are
// sent. What is known of the object is kept in a small file for the next start. This is one process's assistant; where
// many workers share knowledge, see docs/client.md for what they have to agree on.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

const (
	instruction     = "You answer questions about the documents below, briefly, and name the document. Say so if they do not tell."
	outputTokensMax = 400
	cacheTimeout    = 30 * time.Second // a call about the object; the answer to a question may take longer
	eventBytesMax   = 1 << 20          // one line of a stream
)

// Message is a chat message; an object is named by one with the role "cache".
type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// APIError is an answer that is not 200.
type APIError struct {
	Status int
	Body   string
}

func (e *APIError) Error() string { return fmt.Sprintf("status %d: %s", e.Status, e.Body) }

// Client calls the API.
type Client struct {
	URL, Key string
	HTTP     *http.Client
}

// do sends a request and returns the body of a 200 answer, to be closed by the caller.
func (c *Client) do(ctx context.Context, method, path string, body any) (io.ReadCloser, error) {
	encoded, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	var sent io.Reader
	if body != nil {
		sent = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.URL+path, sent)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+c.Key)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	answer, err := c.HTTP.Do(request)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		defer answer.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(answer.Body, 4096))
		return nil, &APIError{answer.StatusCode, strings.TrimSpace(string(text))}
	}
	return answer.Body, nil
}

// CacheObject is what this program looks at of one.
type CacheObject struct {
	ID     string `json:"id"`
	Status string `json:"status"`
}

// object makes a call about a cache object.
func (c *Client) object(method, path string, body any) (CacheObject, error) {
	ctx, cancel := context.WithTimeout(context.Background(), cacheTimeout)
	defer cancel()
	var found CacheObject
	answer, err := c.do(ctx, method, path, body)
	if err != nil {
		return found, err
	}
	defer answer.Close()
	err = json.NewDecoder(answer).Decode(&found)
	return found, err
}

// Book is what is known of the object: a file, so that the next start finds it.
type Book struct {
	Digest string `json:"digest"` // of the knowledge the object was made of
	ID     string `json:"id"`
	Ready  bool   `json:"-"` // asked anew at every start

	path, family string
	knowledge    []Message
	ttl          int
	client       *Client
}

// openBook reads the file; a missing or broken one is an empty book.
func openBook(path string, client *Client, family string, knowledge []Message, ttl int) *Book {
	book := &Book{path: path, family: family, knowledge: knowledge, ttl: ttl, client: client}
	if text, err := os.ReadFile(path); err == nil && json.Unmarshal(text, book) != nil {
		book.Digest, book.ID = "", ""
	}
	return book
}

func (b *Book) digest() string {
	text, _ := json.Marshal([]any{b.client.URL, b.family, b.knowledge}) // strings only: cannot fail
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// prepare brings the object a step nearer to being ready: makes it, or looks at it. Its errors are only told.
func (b *Book) prepare() {
	if b.ID != "" && b.Digest != b.digest() {
		_, _ = b.client.object("DELETE", "/caching/"+b.ID, nil) // other texts; if this fails, its lifetime ends it
		b.ID, b.Ready = "", false
	}
	if b.Ready {
		return
	}
	var err error
	if b.ID == "" {
		err = b.create()
	} else {
		err = b.look()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "no cache, the texts are sent in full:", err)
	}
}

func (b *Book) create() error {
	made, err := b.client.object("POST", "/caching", map[string]any{
		"model": b.family, "messages": b.knowledge, "ttl": b.ttl,
	})
	if err != nil {
		return err
	}
	b.ID, b.Digest, b.Ready = made.ID, b.digest(), made.Status == "ready"
	return b.save()
}

func (b *Book) look() error {
	found, err := b.client.object("GET", "/caching/"+b.ID, nil)
	var refused *APIError
	switch {
	case errors.As(err, &refused) && refused.Status == http.StatusNotFound:
		b.ID = ""
		return b.create()
	case err != nil:
		return err
	case found.Status == "ready":
		b.Ready = true
	case found.Status == "inactive": // its time is over: renewed, computed again
		_, err = b.client.object("PUT", "/caching/"+b.ID, map[string]any{"ttl": b.ttl})
	case found.Status == "error":
		_, err = b.client.object("DELETE", "/caching/"+b.ID, nil)
		b.ID = ""
	}
	return err
}

func (b *Book) save() error {
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	return os.WriteFile(b.path, text, 0o600)
}

// messages is what to send: the object, or the knowledge itself.
func (b *Book) messages(conversation []Message) []Message {
	first := b.knowledge
	if b.Ready {
		first = []Message{{"cache", fmt.Sprintf("cache_id=%s;reset_ttl=%d", b.ID, b.ttl)}}
	}
	return append(append([]Message{}, first...), conversation...)
}

// Usage is Kimi's: inside the choice that a chunk finishes.
type Usage struct {
	PromptTokens int `json:"prompt_tokens"`
	CachedTokens int `json:"cached_tokens"`
}

// Chunk is one event of a stream; an error after its beginning is an event, too.
type Chunk struct {
	Choices []struct {
		Delta struct {
			Content string `json:"content"`
		} `json:"delta"`
		Usage *Usage `json:"usage"`
	} `json:"choices"`
	Error *struct {
		Message string `json:"message"`
	} `json:"error"`
}

// ask streams the answer to out and returns it. When the object has vanished it asks again with the knowledge itself.
func (b *Book) ask(model string, conversation []Message, out io.Writer) (string, *Usage, error) {
	b.prepare()
	body := map[string]any{
		"model": model, "messages": b.messages(conversation), "stream": true, "max_tokens": outputTokensMax,
	}
	answer, err := b.client.do(context.Background(), "POST", "/chat/completions", body)
	var refused *APIError
	if b.Ready && errors.As(err, &refused) &&
		(refused.Status == http.StatusNotFound || refused.Status == http.StatusBadRequest) {
		b.Ready = false // looked at before it is used again
		body["messages"] = b.messages(conversation)
		answer, err = b.client.do(context.Background(), "POST", "/chat/completions", body)
	}
	if err != nil {
		return "", nil, err
	}
	defer answer.Close()
	return read(answer, out)
}

// read takes a stream of server-sent events apart. Lines that are no data keep the connection alive.
func read(stream io.Reader, out io.Writer) (string, *Usage, error) {
	var text strings.Builder
	var usage *Usage
	lines := bufio.NewScanner(stream)
	lines.Buffer(nil, eventBytesMax)
	for lines.Scan() {
		line := lines.Text()
		if !strings.HasPrefix(line, "data:") {
			continue
		}
		data := strings.TrimSpace(strings.TrimPrefix(line, "data:"))
		if data == "[DONE]" {
			return text.String(), usage, nil
		}
		var chunk Chunk
		if err := json.Unmarshal([]byte(data), &chunk); err != nil {
			return text.String(), usage, err
		}
		if chunk.Error != nil {
			return text.String(), usage, errors.New(chunk.Error.Message)
		}
		for _, choice := range chunk.Choices {
			text.WriteString(choice.Delta.Content)
			fmt.Fprint(out, choice.Delta.Content)
			if choice.Usage != nil {
				usage = choice.Usage
			}
		}
	}
	if err := lines.Err(); err != nil {
		return text.String(), usage, err
	}
	return text.String(), usage, io.ErrUnexpectedEOF // a stream ends with [DONE]
}

// documents is the folder's Markdown in a fixed order, so that the same files give the same prompt.
func documents(folder string, charsMax int) (string, error) {
	var paths []string
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && strings.HasSuffix(path, ".md") {
			paths = append(paths, path)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	sort.Strings(paths)
	var all strings.Builder
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		name, err := filepath.Rel(folder, path)
		if err != nil {
			return "", err
		}
		part := fmt.Sprintf("## Document %s\n\n%s\n\n", filepath.ToSlash(name), strings.ToValidUTF8(string(text), "\uFFFD"))
		if all.Len()+len(part) > charsMax {
			fmt.Fprintf(os.Stderr, "left out, -chars is %d: %s\n", charsMax, name)
			continue
		}
		all.WriteString(part)
	}
	if all.Len() == 0 {
		return "", fmt.Errorf("no Markdown in %s, or none that fits", folder)
	}
	return strings.TrimSuffix(all.String(), "\n"), nil
}

func talk(book *Book, model string) {
	book.prepare() // the object is computed while the first question is typed
	var conversation []Message
	questions := bufio.NewScanner(os.Stdin)
	for {
		fmt.Print("\n> ")
		if !questions.Scan() {
			fmt.Println()
			return
		}
		question := strings.TrimSpace(questions.Text())
		if question == "" {
			return
		}
		if question == "/new" {
			conversation = nil
			continue
		}
		asked := append(append([]Message{}, conversation...), Message{"user", question})
		text, usage, err := book.ask(model, asked, os.Stdout)
		fmt.Println()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			continue
		}
		if usage != nil {
			fmt.Printf("[%d of %d prompt tokens from the cache]\n", usage.CachedTokens, usage.PromptTokens)
		}
		conversation = append(asked, Message{"assistant", text})
	}
}

func main() {
	url := flag.String("url", "http://127.0.0.1:8080/v1", "the API, with /v1")
	model := flag.String("model", "moonshot-v1-8k", "answers")
	family := flag.String("family", "moonshot-v1", "what cache objects are made for")
	path := flag.String("book", "assistant.json", "what is known of the cache object")
	ttl := flag.Int("ttl", 3600, "an object's lifetime after a question, in seconds")
	chars := flag.Int("chars", 20000, "most bytes of documents")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: assistant [flags] FOLDER")
		os.Exit(2)
	}
	text, err := documents(flag.Arg(0), *chars)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	key := os.Getenv("OPENAI_API_KEY")
	if key == "" {
		key = "sk-me"
	}
	client := &Client{URL: strings.TrimSuffix(*url, "/"), Key: key, HTTP: &http.Client{}}
	knowledge := []Message{{"system", instruction + "\n\n" + text}}
	talk(openBook(*path, client, *family, knowledge, *ttl), *model)
}
