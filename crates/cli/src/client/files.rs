//! Files in and out of a sandbox, streamed.

use bytes::Bytes;
use futures::{Stream, StreamExt};
use reqwest::multipart::{Form, Part};
use reqwest::{Body, Method};
use serde_json::json;

use super::{Client, ClientError};

/// A file on its way out of a sandbox.
pub(crate) struct Download {
    /// Bytes, where the server knows.
    pub(crate) size: Option<u64>,
    answer: reqwest::Response,
    client: Client,
}

impl Client {
    /// Opens a file in a sandbox.
    pub(crate) async fn read_file(&self, id: &str, path: &str) -> Result<Download, ClientError> {
        let request = self
            .request(
                Method::POST,
                &["v1", "sandboxes", id, "files", "stream", "read"],
            )
            .json(&json!({ "path": path }));
        let answer = self.send(request).await?;
        Ok(Download {
            size: answer.content_length(),
            answer,
            client: self.clone(),
        })
    }

    /// Writes a file in a sandbox. If `content` fails midway the server sees a broken
    /// upload and keeps what was there before. `size` in bytes, where it is known.
    pub(crate) async fn write_file<S, E>(
        &self,
        id: &str,
        path: &str,
        size: Option<u64>,
        content: S,
    ) -> Result<(), ClientError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let body = Body::wrap_stream(content);
        let part = match size {
            Some(size) => Part::stream_with_length(body, size),
            None => Part::stream(body),
        };
        // The path first: the server can then stream the file to where it belongs.
        let form = Form::new()
            .text("path", path.to_owned())
            .part("file", part.file_name("file"));
        let request = self
            .request(
                Method::POST,
                &["v1", "sandboxes", id, "files", "stream", "write"],
            )
            .multipart(form);
        self.send(request).await.map(|_| ())
    }
}

impl Download {
    /// The file's bytes. A connection that breaks is an error, never a short file.
    pub(crate) fn chunks(self) -> impl Stream<Item = Result<Bytes, ClientError>> {
        let client = self.client;
        self.answer
            .bytes_stream()
            .map(move |chunk| chunk.map_err(|error| client.transport(error)))
    }
}
