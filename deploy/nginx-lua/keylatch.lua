-- Checks a request with the sidecar. Needs lua-nginx-module (OpenResty's), no library.
--
-- An error in this file is 500 to nginx, which keylatch_check.conf turns into keylatch's 503. A
-- request is allowed if this file runs to its end.

local IDENTITY = {
    keylatch_key_id = "x-keylatch-key-id",
    keylatch_key_name = "x-keylatch-key-name",
    keylatch_organization_id = "x-keylatch-organization-id",
    keylatch_key_permission = "x-keylatch-permission",
    keylatch_environment = "x-keylatch-environment",
}
local OF_REFUSALS = {
    "content-type",
    "cache-control",
    "x-keylatch-error",
    "www-authenticate",
    "retry-after",
}

if ngx.var.keylatch_preflight == "1" then
    return
end

-- With a body of its own the sub-request does not wait for the client's.
local answer = ngx.location.capture("/_keylatch", {method = ngx.HTTP_GET, body = ""})
local said = {}
for name, value in pairs(answer.header) do
    said[name:lower()] = value -- in the sidecar's spelling, and for some headers in nginx's
end

if answer.status >= 400 and said["x-keylatch-error"] and not answer.truncated then
    ngx.status = answer.status
    for _, name in ipairs(OF_REFUSALS) do
        ngx.header[name] = said[name]
    end
    ngx.header["content-length"] = #answer.body
    ngx.print(answer.body)
    return ngx.exit(ngx.HTTP_OK)
end

if answer.status ~= 200 or answer.truncated then
    return ngx.exit(ngx.HTTP_INTERNAL_SERVER_ERROR) -- down, slow or failing
end
for variable, name in pairs(IDENTITY) do
    if type(said[name]) ~= "string" then -- not a response of keylatch's sidecar
        return ngx.exit(ngx.HTTP_INTERNAL_SERVER_ERROR)
    end
    ngx.var[variable] = said[name]
end
