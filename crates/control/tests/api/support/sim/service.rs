//! The host's RPC, method by method, to the file of its noun.

#![allow(refining_impl_trait)]
#![allow(clippy::needless_lifetimes)]

use std::sync::atomic::Ordering;

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::StreamExt;
use wrenn_types::HostId;
use wrenn_wire::wrenn::host::v1::__buffa::oneof;
use wrenn_wire::wrenn::host::v1::*;

use super::{Service, now_ms};

impl HostService for Service {
    async fn get_info<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, GetInfoRequest>,
    ) -> ServiceResult<GetInfoResponse> {
        Response::ok(GetInfoResponse {
            host_id: HostId::new().to_string(),
            version: "1".into(),
            vmm: "none".into(),
            cpus: 2,
            memory_bytes: 4 << 30,
            templates: vec![
                TemplateInfo {
                    name: "minimal".into(),
                    digest: "sha256:00".into(),
                    vcpus: 1,
                    memory_mib: 512,
                    disk_mib: 2048,
                    ..Default::default()
                },
                TemplateInfo {
                    name: "other".into(),
                    digest: "sha256:01".into(),
                    vcpus: 2,
                    memory_mib: 1024,
                    disk_mib: 2048,
                    ..Default::default()
                },
            ],
            draining_since_unix_ms: self.0.draining.load(Ordering::SeqCst),
            ..Default::default()
        })
    }

    async fn create_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<CreateSandboxResponse> {
        self.0.create_sandbox(request.to_owned_message()).await
    }

    async fn destroy_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroySandboxRequest>,
    ) -> ServiceResult<DestroySandboxResponse> {
        self.0.destroy_sandbox(request.to_owned_message()).await
    }

    async fn get_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetSandboxRequest>,
    ) -> ServiceResult<GetSandboxResponse> {
        self.0.begin("get").await?;
        let sandbox = self.0.get(&request.to_owned_message().sandbox_id)?;
        Response::ok(GetSandboxResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn list_sandboxes<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<ListSandboxesResponse> {
        self.0.begin("list").await?;
        let sandboxes = self.0.sandboxes.lock().unwrap().values().cloned().collect();
        Response::ok(ListSandboxesResponse {
            sandboxes,
            ..Default::default()
        })
    }

    async fn set_lifetime<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SetLifetimeRequest>,
    ) -> ServiceResult<SetLifetimeResponse> {
        self.0.set_lifetime(request.to_owned_message()).await
    }

    async fn set_network<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SetNetworkRequest>,
    ) -> ServiceResult<SetNetworkResponse> {
        self.0.set_network(request.to_owned_message()).await
    }

    async fn list_denials<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListDenialsRequest>,
    ) -> ServiceResult<ListDenialsResponse> {
        self.0.get(&request.to_owned_message().sandbox_id)?;
        Response::ok(ListDenialsResponse {
            denials: vec![Denial {
                at_unix_ms: 1_700_000_000_000,
                protocol: "tcp".into(),
                destination: "10.0.0.1".into(),
                port: Some(443),
                count: 2,
                reason: "forbidden".into(),
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    async fn pause_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PauseSandboxRequest>,
    ) -> ServiceResult<PauseSandboxResponse> {
        self.0.pause_sandbox(request.to_owned_message()).await
    }

    async fn resume_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeSandboxRequest>,
    ) -> ServiceResult<ResumeSandboxResponse> {
        self.0.resume_sandbox(request.to_owned_message()).await
    }

    async fn create_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSnapshotRequest>,
    ) -> ServiceResult<CreateSnapshotResponse> {
        self.0.create_snapshot(request.to_owned_message()).await
    }

    async fn list_snapshots<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListSnapshotsRequest>,
    ) -> ServiceResult<ListSnapshotsResponse> {
        self.0.list_snapshots(request.to_owned_message()).await
    }

    async fn delete_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DeleteSnapshotRequest>,
    ) -> ServiceResult<DeleteSnapshotResponse> {
        self.0.delete_snapshot(request.to_owned_message()).await
    }

    async fn fork_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ForkSandboxRequest>,
    ) -> ServiceResult<ForkSandboxResponse> {
        self.0.fork_sandbox(request.to_owned_message()).await
    }

    async fn rollback_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, RollbackSandboxRequest>,
    ) -> ServiceResult<RollbackSandboxResponse> {
        self.0.rollback_sandbox(request.to_owned_message()).await
    }

    async fn diff_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DiffSandboxRequest>,
    ) -> ServiceResult<DiffSandboxResponse> {
        self.0.diff_sandbox(request.to_owned_message()).await
    }

    async fn exec<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<ExecResponse> {
        self.0.exec(request.to_owned_message()).await
    }

    async fn exec_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecStreamRequest>,
    ) -> ServiceResult<ServiceStream<ProcessOutput>> {
        let request = request.to_owned_message();
        self.0.get(&request.sandbox_id)?;
        let terminal = request.terminal.is_set();
        let command = request.command.into_option().unwrap_or_default();
        let stream = self.0.spawn(command, terminal, request.stdin || terminal)?;
        Ok(Response::new(stream))
    }

    async fn attach(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, AttachRequest>,
    ) -> ServiceResult<ServiceStream<ProcessOutput>> {
        use oneof::process_output::Event;
        let pid = self.0.pid(&request.to_owned_message().process)?;
        let events = [
            Event::StartedPid(pid),
            Event::Stdout(b"attached".to_vec()),
            Event::from(Exit::default()),
        ];
        let stream = futures::stream::iter(events.map(|event| {
            Ok(ProcessOutput {
                event: Some(event),
                ..Default::default()
            })
        }));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn send_input<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let pid = self.0.pid(&request.process)?;
        let processes = self.0.processes.lock().unwrap();
        let _ = processes[&pid].send(request.input.unwrap());
        Response::ok(SendInputResponse::default())
    }

    async fn list_processes<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListProcessesRequest>,
    ) -> ServiceResult<ListProcessesResponse> {
        self.0.list_processes(request.to_owned_message()).await
    }

    async fn read_file(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<ServiceStream<ReadFileResponse>> {
        use oneof::read_file_response::Part;
        let path = request.to_owned_message().path;
        if path.ends_with('/') {
            return Err(ConnectError::invalid_argument(format!(
                "{path} is a directory"
            )));
        }
        let Some(data) = self.0.files.lock().unwrap().get(&path).cloned() else {
            return Err(ConnectError::not_found(format!(
                "path '{path}' does not exist"
            )));
        };
        let mut parts = vec![Part::Size(data.len() as u64)];
        parts.extend(data.chunks(64 * 1024).map(|c| Part::Chunk(c.to_vec())));
        let stream = futures::stream::iter(parts.into_iter().map(|part| {
            Ok(ReadFileResponse {
                part: Some(part),
                ..Default::default()
            })
        }));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn write_file<'a>(
        &'a self,
        _: RequestContext,
        mut requests: InboundStream<WriteFileRequest>,
    ) -> ServiceResult<WriteFileResponse> {
        use oneof::write_file_request::Part;
        let (mut path, mut data) = (String::new(), Vec::new());
        while let Some(message) = requests.next().await {
            match message?.to_owned_message().part {
                Some(Part::Target(target)) => path = target.path,
                Some(Part::Chunk(chunk)) => data.extend(chunk),
                None => {}
            }
            if path == "/full" {
                return Err(ConnectError::resource_exhausted(
                    "no space left in the sandbox",
                ));
            }
        }
        let size = data.len() as u64;
        self.0.files.lock().unwrap().insert(path.clone(), data);
        Response::ok(WriteFileResponse {
            path,
            size,
            ..Default::default()
        })
    }

    async fn list_events<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListEventsRequest>,
    ) -> ServiceResult<ListEventsResponse> {
        self.0.list_events(request.to_owned_message()).await
    }

    async fn get_metrics<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<GetMetricsResponse> {
        self.0.get_metrics(request.to_owned_message()).await
    }

    async fn get_logs<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetLogsRequest>,
    ) -> ServiceResult<GetLogsResponse> {
        self.0.begin("logs").await?;
        self.0.get(&request.to_owned_message().sandbox_id)?;
        Response::ok(GetLogsResponse {
            console: b"boot\nready\n".to_vec(),
            ..Default::default()
        })
    }

    async fn set_draining<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SetDrainingRequest>,
    ) -> ServiceResult<SetDrainingResponse> {
        self.0.begin("drain").await?;
        let since = match request.to_owned_message().draining {
            true => now_ms(),
            false => 0,
        };
        self.0.draining.store(since, Ordering::SeqCst);
        Response::ok(SetDrainingResponse {
            draining_since_unix_ms: since,
            ..Default::default()
        })
    }
}
