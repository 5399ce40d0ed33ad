//! Files in and out of a sandbox, streamed.

use connectrpc::ErrorCode;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use wrenn_store::SandboxRow;
use wrenn_types::{SandboxId, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;
use wrenn_wire::wrenn::host::v1::__buffa::oneof;
use wrenn_wire::wrenn::host::v1::__buffa::view::ReadFileResponseView;

use super::{App, Code, Failure};
use crate::host::HostStream;

/// Messages on their way to the host; each is at most [`CHUNK`] long.
const IN_FLIGHT: usize = 4;

/// Bytes of one message. The RPC layer refuses messages above 4 MiB.
const CHUNK: usize = 256 * 1024;

/// Longest path, as in Linux.
const MAX_PATH: usize = 4095;

/// A file that is read.
pub(crate) struct Download {
    /// In bytes.
    pub(crate) size: u64,
    stream: HostStream<ReadFileResponseView<'static>>,
    first: Option<Vec<u8>>,
}

impl Download {
    /// The next piece; `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        use oneof::read_file_response::Part;
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        while let Some(message) = self.stream.message::<wire::ReadFileResponse>().await? {
            if let Some(Part::Chunk(chunk)) = message.to_owned_message().part {
                return Ok(Some(chunk));
            }
        }
        Ok(None)
    }
}

/// A file that is written. Dropping it before [`Upload::finish`] breaks the transfer off, and nothing
/// of it will be seen.
pub(crate) struct Upload {
    row: SandboxRow,
    sender: mpsc::Sender<Step>,
    call: Call,
}

/// What the client's side tells the call. Only `Whole` ends the stream of messages: were a broken
/// transfer to end it too, half a file would look like a whole one.
enum Step {
    Message(wire::WriteFileRequest),
    Whole,
}

/// The RPC that carries an upload, aborted when dropped.
struct Call(JoinHandle<Result<wire::WriteFileResponse, connectrpc::ConnectError>>);

impl Drop for Call {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Upload {
    /// Passes a piece on; waits while the sandbox is slower than the client.
    pub(crate) async fn write(&mut self, data: &[u8]) {
        use oneof::write_file_request::Part;
        for piece in data.chunks(CHUNK) {
            let message = wire::WriteFileRequest {
                part: Some(Part::Chunk(piece.to_vec())),
                ..Default::default()
            };
            // Nobody receives: the call has ended, and says why.
            if self.sender.send(Step::Message(message)).await.is_err() {
                break;
            }
        }
    }

    /// Waits until the host wants no more of it; [`Upload::finish`] says why.
    pub(crate) async fn given_up(&self) {
        self.sender.closed().await;
    }

    /// Ends the transfer: from here on the file is seen.
    pub(crate) async fn finish(self, app: &App) -> Result<wire::WriteFileResponse, Failure> {
        let Upload {
            row,
            sender,
            mut call,
        } = self;
        // Nobody receives: the call has ended already, and says why.
        let _ = sender.send(Step::Whole).await;
        match (&mut call.0).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(e)) if e.code == ErrorCode::ResourceExhausted => {
                let message = e
                    .message
                    .unwrap_or_else(|| format!("the disk of {} is full", row.id));
                Err(Failure::new(Code::NoSpace, message))
            }
            Ok(Err(e)) => Err(app.refused(row, e).await),
            Err(_) => Err(Failure::new(
                Code::InternalError,
                "the transfer broke off in the server",
            )),
        }
    }
}

impl App {
    /// Opens a file for reading.
    pub(crate) async fn read_file(
        &self,
        team: TeamId,
        id: SandboxId,
        path: String,
        user: Option<String>,
    ) -> Result<Download, Failure> {
        use oneof::read_file_response::Part;
        check_path(&path)?;
        let row = self.running(team, id).await?;
        let request = wire::ReadFileRequest {
            sandbox_id: id.to_string(),
            path,
            user: user.unwrap_or_default(),
            ..Default::default()
        };
        let mut stream = match self.host.read_file(request).await {
            Ok(stream) => stream,
            Err(e) => return Err(self.refused(row, e).await),
        };
        // The size comes first; waiting for it makes what is wrong an answer with a status.
        let mut download = match stream.message::<wire::ReadFileResponse>().await {
            Ok(first) => match first.and_then(|m| m.to_owned_message().part) {
                Some(Part::Size(size)) => Download {
                    size,
                    stream,
                    first: None,
                },
                _ => {
                    let message = "the host agent sent a file without its size";
                    return Err(Failure::new(Code::AgentError, message));
                }
            },
            Err(e) => return Err(self.refused(row, e).await),
        };
        if download.size > 0 {
            download.first = download.next().await?;
        }
        Ok(download)
    }

    /// Opens a file for writing.
    pub(crate) async fn write_file(
        &self,
        team: TeamId,
        id: SandboxId,
        path: String,
        user: Option<String>,
    ) -> Result<Upload, Failure> {
        use oneof::write_file_request::Part;
        check_path(&path)?;
        let row = self.running(team, id).await?;
        let (sender, receiver) = mpsc::channel(IN_FLIGHT);
        let target = wire::WriteFileTarget {
            sandbox_id: id.to_string(),
            path,
            user: user.unwrap_or_default(),
            ..Default::default()
        };
        let first = wire::WriteFileRequest {
            part: Some(Part::from(target)),
            ..Default::default()
        };
        // There is room for it: the channel is new.
        let _ = sender.try_send(Step::Message(first));
        let messages = futures::stream::unfold(receiver, |mut receiver| async move {
            match receiver.recv().await {
                Some(Step::Message(message)) => Some((message, receiver)),
                Some(Step::Whole) => None,
                // The transfer broke off; the call is about to be aborted.
                None => std::future::pending().await,
            }
        });
        let host = self.host.clone();
        let call = Call(tokio::spawn(async move {
            let reply = host.write_file(messages).await?;
            Ok(reply.into_owned())
        }));
        Ok(Upload { row, sender, call })
    }
}

fn check_path(path: &str) -> Result<(), Failure> {
    if path.is_empty() {
        return Err(Failure::invalid("`path` must name a file in the sandbox"));
    }
    if path.len() > MAX_PATH || path.contains('\0') {
        return Err(Failure::invalid(format!(
            "`path` must have at most {MAX_PATH} bytes and no NUL"
        )));
    }
    Ok(())
}
