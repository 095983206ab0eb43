-- Asks the sidecar about a request. Needs lua-nginx-module (OpenResty's), no library.
--
-- A mistake in here is 500 to nginx, which keylatch_check.conf turns into keylatch's 503. Whoever
-- comes to the end of this file is let in.

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

-- With a body of its own the question does not wait for the client's.
local answer = ngx.location.capture("/_keylatch", {method = ngx.HTTP_GET, body = ""})
local said = {}
for name, value in pairs(answer.header) do
    said[name:lower()] = value -- they come as they were written, and nginx spells some itself
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
    return ngx.exit(ngx.HTTP_INTERNAL_SERVER_ERROR) -- down, slow or at fault
end
for variable, name in pairs(IDENTITY) do
    if type(said[name]) ~= "string" then -- whoever says so is not keylatch's sidecar
        return ngx.exit(ngx.HTTP_INTERNAL_SERVER_ERROR)
    end
    ngx.var[variable] = said[name]
end
