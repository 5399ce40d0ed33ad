//! Files of a sandbox, streamed in both directions.

use bytes::Bytes;
use connectrpc::{ConnectError, InboundStream, ServiceStream, StreamMessage};
use futures::StreamExt;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use wrenn_wire::wrenn::host::v1 as rpc;
use wrenn_wire::wrenn::host::v1::__buffa::oneof::{read_file_response, write_file_request};

use super::{HostRpc, sandbox_id, while_there};
use crate::guest::chain;

/// Chunks between a fast and a slow side.
const BUFFER: usize = 8;

fn part(part: read_file_response::Part) -> rpc::ReadFileResponse {
    rpc::ReadFileResponse {
        part: Some(part),
        ..Default::default()
    }
}

impl HostRpc {
    pub(super) async fn read(
        &self,
        request: rpc::ReadFileRequest,
    ) -> Result<ServiceStream<rpc::ReadFileResponse>, ConnectError> {
        let handle = self.0.manager.get(sandbox_id(&request.sandbox_id)?)?;
        let live = handle.running().await?;
        let in_use = handle.activity.begin();
        let mut bond = handle.bond(&live);
        let asked = live.guest.read_file(&request.path, &request.user);
        let (size, mut body) = while_there(&mut bond, asked).await?;
        let (sender, receiver) = mpsc::channel(BUFFER);
        tokio::spawn(async move {
            let _in_use = in_use;
            let mut sent = Ok(part(read_file_response::Part::Size(size)));
            loop {
                let last = sent.is_err();
                if sender.send(sent).await.is_err() || last {
                    return;
                }
                // A frame may carry trailers instead of data; they say nothing here.
                let chunk = async {
                    loop {
                        let frame = body.frame().await.transpose().map_err(|error| {
                            let why = chain(&error);
                            ConnectError::data_loss(format!("the file broke off: {why}"))
                        })?;
                        match frame.map(Frame::into_data) {
                            Some(Ok(data)) => return Ok::<_, ConnectError>(Some(data)),
                            Some(Err(_)) => continue,
                            None => return Ok(None),
                        }
                    }
                };
                sent = match while_there(&mut bond, chunk).await {
                    Ok(Some(data)) => Ok(part(read_file_response::Part::Chunk(data.into()))),
                    Ok(None) => return,
                    Err(error) => Err(error),
                };
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    pub(super) async fn write(
        &self,
        mut requests: InboundStream<rpc::WriteFileRequest>,
    ) -> Result<rpc::WriteFileResponse, ConnectError> {
        let wrong = "the first message must name sandbox and path, the others carry bytes";
        let first = requests
            .next()
            .await
            .ok_or_else(|| ConnectError::invalid_argument(wrong))??;
        let Some(write_file_request::Part::Target(target)) = first.to_owned_message().part else {
            return Err(ConnectError::invalid_argument(wrong));
        };
        let handle = self.0.manager.get(sandbox_id(&target.sandbox_id)?)?;
        let (live, _in_use) = handle.in_use().await?;
        let (sender, receiver) = mpsc::channel::<Result<Frame<Bytes>, ConnectError>>(BUFFER);
        let body = BodyExt::boxed(StreamBody::new(ReceiverStream::new(receiver)));
        let write = live.guest.write_file(&target.path, &target.user, body);
        let feed = async move {
            let mut size = 0u64;
            while let Some(request) = requests.next().await {
                let chunk = request.and_then(|m: StreamMessage<rpc::WriteFileRequest>| {
                    match m.to_owned_message().part {
                        Some(write_file_request::Part::Chunk(chunk)) => Ok(chunk),
                        _ => Err(ConnectError::invalid_argument(wrong)),
                    }
                });
                let failed = chunk.is_err();
                let frame = chunk.map(|chunk| {
                    size += chunk.len() as u64;
                    Frame::data(Bytes::from(chunk))
                });
                // A broken sender breaks the request to the guest too, which then keeps
                // nothing; and a guest that stopped reading says why in its answer.
                if sender.send(frame).await.is_err() || failed {
                    break;
                }
            }
            size
        };
        let both = async {
            let (written, size) = tokio::join!(write, feed);
            written.map(|()| size)
        };
        let size = while_there(&mut handle.bond(&live), both).await?;
        Ok(rpc::WriteFileResponse {
            path: target.path,
            size,
            ..Default::default()
        })
    }
}
