//! The service trait, method by method, to the file of its noun.

#![allow(
    refining_impl_trait,
    reason = "answers own what they hold, which the trait leaves open"
)]

use std::sync::Arc;

use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest,
    ServiceResult, ServiceStream,
};
use wrenn_wire::wrenn::host::v1::*;

use crate::agent::Parts;
use crate::machine::reached;

/// The service over the agent's parts.
#[derive(Clone)]
pub struct HostRpc(pub(super) Arc<Parts>);

impl HostRpc {
    /// A service over these parts.
    pub fn new(parts: Arc<Parts>) -> Self {
        HostRpc(parts)
    }
}

fn answer<T>(result: Result<T, ConnectError>) -> ServiceResult<T> {
    result.map(Response::new)
}

/// The same for what changes a sandbox's life.
fn done<T>(result: Result<T, ConnectError>) -> ServiceResult<T> {
    if result.is_ok() {
        reached("answer");
    }
    answer(result)
}

impl HostService for HostRpc {
    async fn get_info(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, GetInfoRequest>,
    ) -> ServiceResult<impl Encodable<GetInfoResponse> + Send + use<>> {
        answer(self.info().await)
    }

    async fn create_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<impl Encodable<CreateSandboxResponse> + Send + use<>> {
        done(self.create(request.to_owned_message()).await)
    }

    async fn destroy_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroySandboxRequest>,
    ) -> ServiceResult<impl Encodable<DestroySandboxResponse> + Send + use<>> {
        done(self.destroy(request.sandbox_id).await)
    }

    async fn get_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, GetSandboxRequest>,
    ) -> ServiceResult<impl Encodable<GetSandboxResponse> + Send + use<>> {
        answer(self.get(request.sandbox_id))
    }

    async fn list_sandboxes(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<impl Encodable<ListSandboxesResponse> + Send + use<>> {
        Response::ok(self.list())
    }

    async fn set_lifetime(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SetLifetimeRequest>,
    ) -> ServiceResult<impl Encodable<SetLifetimeResponse> + Send + use<>> {
        answer(self.lifetime(request.to_owned_message()).await)
    }

    async fn set_network(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SetNetworkRequest>,
    ) -> ServiceResult<impl Encodable<SetNetworkResponse> + Send + use<>> {
        answer(HostRpc::set_network(self, request.to_owned_message()).await)
    }

    async fn list_denials(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ListDenialsRequest>,
    ) -> ServiceResult<impl Encodable<ListDenialsResponse> + Send + use<>> {
        answer(HostRpc::list_denials(self, request.sandbox_id).await)
    }

    async fn pause_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, PauseSandboxRequest>,
    ) -> ServiceResult<impl Encodable<PauseSandboxResponse> + Send + use<>> {
        done(self.pause(request.to_owned_message()).await)
    }

    async fn resume_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeSandboxRequest>,
    ) -> ServiceResult<impl Encodable<ResumeSandboxResponse> + Send + use<>> {
        done(self.resume(request.to_owned_message()).await)
    }

    async fn create_snapshot(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<CreateSnapshotResponse> + Send + use<>> {
        done(self.snapshot(request.to_owned_message()).await)
    }

    async fn list_snapshots(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSnapshotsRequest>,
    ) -> ServiceResult<impl Encodable<ListSnapshotsResponse> + Send + use<>> {
        answer(self.snapshots().await)
    }

    async fn delete_snapshot(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, DeleteSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<DeleteSnapshotResponse> + Send + use<>> {
        answer(self.delete_snapshot(request.snapshot_id).await)
    }

    async fn fork_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ForkSandboxRequest>,
    ) -> ServiceResult<impl Encodable<ForkSandboxResponse> + Send + use<>> {
        done(self.fork(request.to_owned_message()).await)
    }

    async fn rollback_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, RollbackSandboxRequest>,
    ) -> ServiceResult<impl Encodable<RollbackSandboxResponse> + Send + use<>> {
        done(self.roll_back(request.to_owned_message()).await)
    }

    async fn diff_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, DiffSandboxRequest>,
    ) -> ServiceResult<impl Encodable<DiffSandboxResponse> + Send + use<>> {
        answer(self.diff(request.to_owned_message()).await)
    }

    async fn exec(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<impl Encodable<ExecResponse> + Send + use<>> {
        answer(self.exec_to_end(request.to_owned_message()).await)
    }

    async fn exec_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecStreamRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ProcessOutput> + Send + use<>>> {
        answer(self.exec_following(request.to_owned_message()).await)
    }

    async fn attach(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, AttachRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ProcessOutput> + Send + use<>>> {
        answer(self.attach_to(request.to_owned_message()).await)
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<impl Encodable<SendInputResponse> + Send + use<>> {
        answer(self.input(request.to_owned_message()).await)
    }

    async fn list_processes(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ListProcessesRequest>,
    ) -> ServiceResult<impl Encodable<ListProcessesResponse> + Send + use<>> {
        answer(self.processes(request.sandbox_id).await)
    }

    async fn read_file(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ReadFileResponse> + Send + use<>>> {
        answer(self.read(request.to_owned_message()).await)
    }

    async fn write_file(
        &self,
        _: RequestContext,
        requests: InboundStream<WriteFileRequest>,
    ) -> ServiceResult<impl Encodable<WriteFileResponse> + Send + use<>> {
        answer(self.write(requests).await)
    }

    async fn get_logs(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, GetLogsRequest>,
    ) -> ServiceResult<impl Encodable<GetLogsResponse> + Send + use<>> {
        answer(self.logs(request.to_owned_message()).await)
    }

    async fn list_events(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ListEventsRequest>,
    ) -> ServiceResult<impl Encodable<ListEventsResponse> + Send + use<>> {
        answer(self.events(request.to_owned_message()).await)
    }

    async fn get_metrics(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<impl Encodable<GetMetricsResponse> + Send + use<>> {
        answer(self.metrics(request.to_owned_message()))
    }

    async fn set_draining(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SetDrainingRequest>,
    ) -> ServiceResult<impl Encodable<SetDrainingResponse> + Send + use<>> {
        answer(HostRpc::set_draining(self, request.draining).await)
    }
}
