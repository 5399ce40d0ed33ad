//! The OpenAPI document, generated from the routes, and the pages that show it.

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, SecurityScheme};
use utoipa::openapi::{
    Info, LicenseBuilder, OpenApi, OpenApiBuilder, SecurityRequirement, Server, Tag,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::{Config, SwaggerUi};

/// Name of the one way to authenticate.
const KEY: &str = "api_key";

/// The document.
pub(crate) fn document() -> OpenApi {
    let super::Routes {
        closed,
        sockets,
        watched,
        open,
    } = super::routes();
    // What asks for no key is told apart from what does; a key that is optional is no need.
    let (open_doc, open_paths) = with_paths(open.merge(watched));
    let mut document = OpenApiBuilder::new()
        .info(
            Info::builder()
                .title("Wrenn")
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(DESCRIPTION))
                .license(Some(
                    LicenseBuilder::new()
                        .name("Apache-2.0")
                        .identifier(Some("Apache-2.0"))
                        .build(),
                ))
                .build(),
        )
        // Relative, so that it holds wherever this server is reached.
        .servers(Some([Server::new("/")]))
        .tags(Some(TAGS.map(|(name, text)| {
            let mut tag = Tag::new(name);
            tag.description = Some(text.to_owned());
            tag
        })))
        .security(Some([SecurityRequirement::new(KEY, Vec::<String>::new())]))
        .build();
    for part in [closed.into_openapi(), sockets.into_openapi(), open_doc] {
        document.merge(part);
    }
    let scheme = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description(
        "X-API-Key",
        "`wrn_` and 64 hexadecimal digits; E2B's clients may write `e2b_` instead.",
    )));
    let components = document.components.get_or_insert_default();
    components
        .security_schemes
        .insert(KEY.to_owned(), scheme.into());
    for path in open_paths {
        if let Some(item) = document.paths.paths.get_mut(&path)
            && let Some(get) = item.get.as_mut()
        {
            // An empty list: no credential is asked for.
            get.security = Some(Vec::new());
        }
    }
    document
}

const DESCRIPTION: &str = "Virtual machines for AI agents. Everything under `/v1` is Wrenn's own API; \
    `/v1/capsules` is another name of `/v1/sandboxes`. The routes outside of `/v1` are those that E2B's \
    clients call. Errors are `{\"error\":{\"code\",\"message\"}}` under `/v1` and \
    `{\"code\",\"message\"}` elsewhere.";

const TAGS: [(&str, &str); 8] = [
    ("sandboxes", "Create, look at and end sandboxes"),
    ("processes", "Run programs in a sandbox"),
    ("files", "Files in and out of a sandbox"),
    (
        "network",
        "What a sandbox may reach, and what was refused to it",
    ),
    ("host", "The machine that runs the sandboxes"),
    ("api-keys", "Who may use this API"),
    ("server", "This server itself"),
    ("e2b", "The same for E2B's clients"),
];

fn with_paths<S: Clone + Send + Sync + 'static>(
    router: OpenApiRouter<S>,
) -> (OpenApi, Vec<String>) {
    let document = router.into_openapi();
    let paths = document.paths.paths.keys().cloned().collect();
    (document, paths)
}

/// The document as YAML and Swagger UI on it, all from this server.
pub(crate) fn routes() -> Router {
    // Made of constants; the test on the committed document shows that it has a YAML form.
    let yaml = document().to_yaml().unwrap_or_default();
    let config = Config::from("/openapi.yaml")
        .try_it_out_enabled(true)
        .persist_authorization(true)
        // By default the page asks a server on the internet whether the document is valid.
        .validator_url("none");
    Router::from(SwaggerUi::new("/docs").config(config)).route(
        "/openapi.yaml",
        get(move || {
            let yaml = yaml.clone();
            async move { ([(CONTENT_TYPE, "application/yaml; charset=utf-8")], yaml) }
        }),
    )
}
