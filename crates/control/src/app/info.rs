//! The host: what it is, and which templates it has.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wrenn_types::{Shape, ShapeLimits};
use wrenn_wire::wrenn::host::v1 as wire;

use super::{App, Failure};
use crate::host::HostInfo;

/// A description this old is good enough to check a request against.
const FRESH: Duration = Duration::from_secs(5);

/// The template that is meant where none is named.
pub(crate) const DEFAULT_TEMPLATE: &str = "minimal";

/// Other names of the default template: the published native client's, and E2B's.
const DEFAULT_ALIASES: [&str; 2] = ["minimal-ubuntu", "base"];

/// The only tag there is so far.
const DEFAULT_TAG: &str = "default";

/// A template as a request names it, resolved.
pub(crate) struct Template {
    pub(crate) name: String,
    pub(crate) shape: Shape,
    pub(crate) limits: ShapeLimits,
}

impl App {
    /// What the host says about itself now.
    pub(crate) async fn host_info(&self) -> Result<Arc<HostInfo>, Failure> {
        let mut known = self.info.lock().await;
        let reply = self.host.get_info(wire::GetInfoRequest::default()).await?;
        let info = Arc::new(HostInfo::from(reply.into_owned()));
        *known = Some((Instant::now(), Arc::clone(&info)));
        Ok(info)
    }

    async fn recent_info(&self) -> Result<Arc<HostInfo>, Failure> {
        if let Some((at, info)) = &*self.info.lock().await
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(info));
        }
        self.host_info().await
    }

    /// The template that a request names, or the default one. Unknown: an error that lists those there
    /// are.
    pub(crate) async fn template(&self, asked: Option<&str>) -> Result<Template, Failure> {
        let asked = asked.unwrap_or(DEFAULT_TEMPLATE);
        let name = template_name(asked);
        let mut info = self.recent_info().await?;
        if !info.templates.contains_key(name) {
            // It may have been built a moment ago.
            info = self.host_info().await?;
        }
        let Some(found) = info.templates.get(name) else {
            let there: Vec<String> = info.templates.keys().cloned().collect();
            let list = match there.as_slice() {
                [] => "none yet: build one with `wrenn image build minimal`".to_owned(),
                names => names.join(", "),
            };
            let shown: String = asked.chars().take(100).collect();
            return Err(Failure::not_found(format!(
                "there is no template `{shown}`; there is {list}"
            ))
            .with("template", shown)
            .with("templates", there));
        };
        Ok(Template {
            name: name.to_owned(),
            shape: shape_of(found),
            limits: self.config.limits.unwrap_or_else(|| info.limits()),
        })
    }
}

/// The shape of an image's sandboxes where no other is asked for.
pub(super) fn shape_of(template: &wire::TemplateInfo) -> Shape {
    let default = Shape::DEFAULT;
    Shape {
        vcpus: match template.vcpus {
            0 => default.vcpus,
            n => wrenn_types::Vcpus(n),
        },
        memory: match template.memory_mib {
            0 => default.memory,
            n => wrenn_types::MemoryMib(n),
        },
    }
}

/// A template's own name: without the default tag, aliases resolved.
pub(crate) fn template_name(asked: &str) -> &str {
    let bare = match asked.rsplit_once(':') {
        Some((name, DEFAULT_TAG)) => name,
        _ => asked,
    };
    if DEFAULT_ALIASES.contains(&bare) {
        DEFAULT_TEMPLATE
    } else {
        bare
    }
}

#[cfg(test)]
mod tests {
    use super::template_name;

    #[test]
    fn aliases_and_the_default_tag_name_the_template() {
        for asked in [
            "minimal",
            "base",
            "minimal-ubuntu",
            "base:default",
            "minimal:default",
        ] {
            assert_eq!(template_name(asked), "minimal");
        }
        for other in ["base:v2", "basement", "", "x:default:v2"] {
            assert_eq!(template_name(other), other);
        }
        assert_eq!(template_name("mine:default"), "mine");
    }
}
